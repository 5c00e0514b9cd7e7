"""An attention function of transformers that notes what it reads from the visual tokens.

T text positions, H query heads, d head width, R the last positions of the row, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owlfuse.fusion.base import AttentionCall, Fusion, attention_weights, text_mask


class Notes:
    """An attention function of transformers that does what the LLM's own does, and notes what the last positions of the one
    row read from the visual tokens.

    Args:
        own: the LLM's implementation.
        placeholder: (T,) bool.
        rows: R.

    Attributes:
        found: of each of the layers, (R, S) float32, the mean over heads.
    """

    def __init__(self, fusion: Fusion, own: str, placeholder: Tensor, rows: int, layers: list[int]) -> None:
        # flash attention takes no mask that says who sees whom, and the weights need one
        self.own = "sdpa" if own.startswith("flash") else own
        self.fusion = fusion
        self.placeholder = placeholder
        self.rows = rows
        self.layers = layers
        self.found: dict[int, Tensor] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `owlfuse.fusion.hyperattention.attend`."""
        if module.layer_idx in self.layers:
            last = query[:, :, -self.rows :]
            mask = text_mask(attention_mask, last, key)[:, :, -self.rows :]
            scaling = kwargs.get("scaling") or query.shape[3] ** -0.5
            weights = attention_weights(last, key, mask, scaling)
            values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            text = (weights.to(value.dtype) @ values).transpose(1, 2).flatten(2)
            call = AttentionCall(module, last, key, mask, weights, text, scaling, self.placeholder, kwargs.get("visual"))
            self.found[module.layer_idx] = self.fusion.looks(call)[0].mean(0)
        return ALL_ATTENTION_FUNCTIONS[self.own](module, query, key, value, attention_mask, **kwargs)


@contextmanager
def noting(llm: PreTrainedModel, notes: Notes) -> Iterator[None]:
    """Inside, the LLM's attention goes through `notes`."""
    before = llm.config._attn_implementation
    name = f"owlfuse_notes_{id(notes)}"
    ALL_ATTENTION_FUNCTIONS[name] = notes
    ALL_MASK_ATTENTION_FUNCTIONS[name] = ALL_MASK_ATTENTION_FUNCTIONS[notes.own]
    llm.set_attn_implementation(name)
    try:
        yield
    finally:
        llm.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]
