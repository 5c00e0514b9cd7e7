"""Greedy answers by transformers' generate. B rows, T text positions."""

from __future__ import annotations

import torch
from torch import Tensor

from owlfuse.hub.modeling import OwlfuseForConditionalGeneration
from owlfuse.model import MultimodalLM
from owlfuse.types import Batch


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")  # compiled layers would be compiled again for cache and lengths, which takes longer
def generate_greedy(model: MultimodalLM, batch: Batch, max_new_tokens: int, end_id: int) -> Tensor:
    """The likeliest continuation of each row, (B, at most max_new_tokens) ids; after `end_id` a row holds `end_id`.

    `batch` is padded on the left. The backbone and the connector run once, and visual keys and values are computed once.
    """
    wrapped = OwlfuseForConditionalGeneration.wrap(model, None, {"eos_token_id": end_id, "pad_token_id": end_id})
    rows = wrapped.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        visual=model.encode(batch),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return rows[:, batch.input_ids.shape[1] :]
