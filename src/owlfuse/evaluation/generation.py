"""Greedy answers by transformers' generate. B rows, T text positions."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.types import Batch
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.model.multimodal import MultimodalLM


# no inference_mode: FSDP keeps what its first forward makes, and training goes on with it
@torch.no_grad()
# compiled layers would be compiled again for cache and lengths, which takes longer
@torch.compiler.set_stance("force_eager")
def generate_greedy(
    model: MultimodalLM, batch: Batch, max_new_tokens: int, encoder: ChatEncoder
) -> Tensor:
    """The likeliest continuation of each row, (B, at most max_new_tokens) ids, with padding behind
    what ends it.

    `batch` is padded on the left. The backbone and the connector run once, and visual keys and
    values are computed once.
    """
    ends = encoder.answer_format.generation(encoder.tokenizer, model.llm)
    wrapped = OwlfuseForConditionalGeneration.wrap(model, None, ends)
    rows = wrapped.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        visual=model.encode(batch),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        tokenizer=encoder.tokenizer,  # for an end mark of several tokens
    )
    return rows[:, batch.input_ids.shape[1] :]


class Clock(TextStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """See `TextStreamer`; the first call brings the prompt."""
        if value.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """See `TextStreamer`."""


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def milliseconds_per_token(
    model: OwlfuseForConditionalGeneration, tokens: int, **prompt: Any
) -> float:
    """Median time between two tokens of one answer of `tokens` + 1; the first, which reads the
    prompt, apart.

    `prompt` is what `generate` takes: (1, T) input_ids, and pictures.
    """
    clock = Clock()
    count = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1}
    model.generate(**prompt, **count, do_sample=False, streamer=clock)
    answered = clock.times[1:]
    return 1000 * statistics.median(b - a for a, b in pairwise(answered))
