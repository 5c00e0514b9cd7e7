"""Answers by transformers' generate. B rows, T text positions."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.types import Batch
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.model.llm import position_limit
from owlfuse.model.multimodal import MultimodalLM

log = logging.getLogger(__name__)


# no inference_mode: FSDP keeps what its first forward makes, and training goes on with it
@torch.no_grad()
# compiled layers would be compiled again for cache and lengths, which takes longer
@torch.compiler.set_stance("force_eager")
def generate(
    model: OwlfuseForConditionalGeneration,
    inputs: Mapping[str, Any],
    tokenizer: Any = None,
    **options: Any,
) -> Tensor:
    """Returns the ids (B, at most max_new_tokens) that the model writes after its rows, with
    padding behind what ends them.

    Args:
        inputs: `input_ids` (B, T), padded on the left, their `attention_mask`, and pictures or
            visual tokens.
        tokenizer: needed for an end mark of several tokens.
        options: of transformers' `generate`.
    """
    rows = model.generate(**inputs, tokenizer=tokenizer, **options)
    return rows[:, inputs["input_ids"].shape[1] :]


# the backbone's blocks may be compiled too
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def generate_greedy(
    model: MultimodalLM,
    batch: Batch,
    max_new_tokens: int,
    encoder: ChatEncoder,
    synced: bool = False,
) -> Tensor:
    """Returns the likeliest continuation of each row of a batch (see `generate`), with the ends
    of the chat template. The backbone and the connector run once. Where the LLM has no more
    positions for a row, its answer ends, and a warning says so.

    Args:
        synced: the model is shared out over ranks with other rows, and each goes on until all have
            ended.
    """
    # the template's end of turn, which may be another token than the LLM's end of text
    ends = encoder.answer_format.generation(encoder.tokenizer, model.llm)
    wrapped = OwlfuseForConditionalGeneration.wrap(model, None, ends)
    lengths = batch.attention_mask.sum(1).tolist()
    limits = [answer_limit(model, length, max_new_tokens) for length in lengths]
    if model.llm.config.model_type == "gpt_neo":
        # its table of causal masks counts the padding too, which the longest prompt decides
        limits = [min(limits)] * len(limits)
    positions = position_limit(model.llm)
    if min(limits) < max_new_tokens:
        log.warning(
            "answers to %d of %d prompts end before max_new_tokens=%d, the first after %d tokens: "
            "the longest prompt takes %d of the LLM's %s positions",
            sum(limit < max_new_tokens for limit in limits),
            len(limits),
            max_new_tokens,
            min(limits),
            max(lengths),
            positions,
        )
    return generate(
        wrapped,
        {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "visual": model.encode(batch),
            # a prompt may be longer than the LLM was made for
            "max_positions": positions and max(positions, *lengths),
        },
        encoder.tokenizer,
        max_new_tokens=max(limits),
        stopping_criteria=StoppingCriteriaList([RowLimits(batch.input_ids, limits)]),
        do_sample=False,
        # by default transformers finds out, of models alone that it has sharded itself
        synced_gpus=synced,
    )


class RowLimits(StoppingCriteria):
    """Ends each row of `prompts` (B, T) after its number of new tokens, of `limits`."""

    def __init__(self, prompts: Tensor, limits: list[int]) -> None:
        self.lengths = prompts.shape[1] + torch.tensor(limits, device=prompts.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns which rows end (B,)."""
        return input_ids.shape[1] >= self.lengths


def answer_limit(model: MultimodalLM, length: int, max_new_tokens: int) -> int:
    """Returns how many tokens may follow a prompt of `length`: `max_new_tokens`, or as many as the
    LLM has positions for, and at least the one that the prompt's own last position gives."""
    positions = position_limit(model.llm)
    if positions is None:
        return max_new_tokens
    return max(1, min(max_new_tokens, positions - length))


class Clock(TextStreamer):
    """Records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Records a time; the first call, of transformers' `generate`, has the prompt."""
        # transformers has copied the ids to the CPU, for which it waited until they were there
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: there is no text to flush."""


def milliseconds_per_token(
    model: OwlfuseForConditionalGeneration, tokens: int, **prompt: Any
) -> float:
    """Returns the median time between two tokens of one answer of `tokens` + 1; the first, which
    reads the prompt, apart.

    `prompt` is what `generate` takes: (1, T) input_ids, and pictures.
    """
    clock = Clock()
    generate(
        model,
        prompt,
        max_new_tokens=tokens + 1,
        # an answer that ended early would leave too few times for a median
        min_new_tokens=tokens + 1,
        do_sample=False,
        streamer=clock,
    )
    # without the prompt's own call
    answered = clock.times[1:]
    return 1000 * statistics.median(b - a for a, b in pairwise(answered))
