"""Greedy answers with a key-value cache. B rows, T text positions, V vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from owlfuse.model import MultimodalLM
from owlfuse.types import Batch


@torch.inference_mode()
def generate_greedy(model: MultimodalLM, batch: Batch, max_new_tokens: int, end_id: int) -> Tensor:
    """The likeliest continuation of each row, (B, at most max_new_tokens) ids; after `end_id` a row holds `end_id`.

    `batch` is padded on the left. The backbone and the connector run once, and visual keys and values are computed once.
    """
    visual = model.encode(batch)
    visual.kept = {}
    cache = DynamicCache(config=model.llm.config)
    finished = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
    answers: list[Tensor] = []
    for _ in range(max_new_tokens):
        token = model(batch, visual, cache)[:, -1].argmax(-1).masked_fill(finished, end_id)
        answers.append(token)
        finished = finished | (token == end_id)
        if finished.all():
            break
        batch = next_step(batch, token)
    return torch.stack(answers, dim=1)


def next_step(batch: Batch, token: Tensor) -> Batch:
    """The batch of one decoding step: the new tokens (B,), none of them a placeholder, behind all that came before."""
    return replace(
        batch,
        input_ids=token[:, None],
        placeholder=torch.zeros_like(token[:, None], dtype=torch.bool),
        attention_mask=torch.cat([batch.attention_mask, torch.ones_like(token[:, None])], dim=1),
    )
