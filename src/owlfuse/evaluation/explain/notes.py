"""Noting what the LLM's attention reads from the visual tokens.

T text positions, H query heads, d head width, R the last positions of the row, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owlfuse.model.fusion.base import AttentionCall, Fusion, attention_weights, text_mask


@dataclass
class Notes:
    """What the last positions of the one row read from the visual tokens."""

    fusion: Fusion
    placeholder: Tensor
    """(T,) bool, True at the positions that images take."""
    rows: int
    """R."""
    layers: list[int]
    found: dict[int, Tensor] = field(default_factory=dict)
    """Of each of the layers (R, S) float32, the mean over heads."""


ACTIVE: ContextVar[Notes | None] = ContextVar("notes", default=None)
"""Of this thread, so that another one that uses the model meanwhile notes nothing."""


@contextmanager
def noting(llm: PreTrainedModel, notes: Notes) -> Iterator[None]:
    """Inside, the LLM's attention is as before, and noted."""
    before = llm.config._attn_implementation
    # flash attention has no mask that says who sees whom
    own = "sdpa" if before.startswith("flash") else before
    name = f"owlfuse_notes_{own}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(attend_and_note, own))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    llm.set_attn_implementation(name)
    token = ACTIVE.set(notes)
    try:
        yield
    finally:
        ACTIVE.reset(token)
        llm.set_attn_implementation(before)


def attend_and_note(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers that does what `own` does.

    Shapes as of `hyperattention.attend`.
    """
    notes = ACTIVE.get()
    layer: Any = module.layer_idx
    if notes is not None and layer in notes.layers:
        last = query[:, :, -notes.rows :]
        mask = text_mask(attention_mask, last, key)[:, :, -notes.rows :]
        scaling = kwargs.get("scaling") or query.shape[3] ** -0.5
        weights = attention_weights(last, key, mask, scaling)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        text = (weights.to(value.dtype) @ values).transpose(1, 2).flatten(2)
        call = AttentionCall(
            module, last, key, mask, weights, text, scaling, notes.placeholder, kwargs.get("visual")
        )
        notes.found[layer] = notes.fusion.looks(call)[0].mean(0)
    return ALL_ATTENTION_FUNCTIONS[own](module, query, key, value, attention_mask, **kwargs)
