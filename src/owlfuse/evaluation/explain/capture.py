"""Capturing how much the LLM's attention reads from the visual tokens.

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

from owlfuse.model.fusion.base import (
    AttentionCall,
    Fusion,
    VisualReader,
    attention_weights,
    text_mask,
)
from owlfuse.model.llm import attention_function


@dataclass
class AttentionCapture:
    """How much the last positions of the one row read from the visual tokens."""

    fusion: Fusion
    placeholder: Tensor
    """(T,) bool, True at the positions that images take."""
    rows: int
    """R."""
    layers: list[int]
    weights: dict[int, Tensor] = field(default_factory=dict)
    """Of each of the layers (R, S) float32, the mean over heads."""


NOT_PLAIN = ("softcap", "s_aux", "indices", "block_indices", "position_bias")
"""Arguments of attention whose weights are not those that are computed here: capped scores (Gemma
2), sinks (GPT-OSS), chosen keys (DeepSeek V3.2), blocks of keys (MiniMax M3) and a bias by
distance (Inkling)."""

ACTIVE: ContextVar[AttentionCapture | None] = ContextVar("capture", default=None)
"""Of this thread, so that nothing is captured of another one that uses the model meanwhile."""


@contextmanager
def capture_attention(llm: PreTrainedModel, capture: AttentionCapture) -> Iterator[None]:
    """Captures the weights of the LLM's attention inside the block, which is otherwise as
    before."""
    # private: transformers has a setter for it, and no getter
    before = llm.config._attn_implementation
    # flash attention has no mask that says who sees whom
    plain = "sdpa" if before.startswith("flash") else before
    name = f"owlfuse_capture_{plain}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(attend_and_capture, plain))
    # transformers looks up the mask by the same name
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    readers = capture.fusion.visual_attention_modules(llm)
    handles = []
    for layer in capture.layers:
        if layer in readers:
            # torch's fused attention gives no weights out: they are computed from its input
            hook = partial(capture_reader, capture, layer)
            handles.append(readers[layer].register_forward_pre_hook(hook))
    # where the text reads pictures by modules beside it, the LLM's attention stays as it is
    if not readers:
        llm.set_attn_implementation(name)
    token = ACTIVE.set(capture)
    try:
        yield
    finally:
        ACTIVE.reset(token)
        llm.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def capture_reader(
    capture: AttentionCapture,
    layer: int,
    reader: VisualReader,
    args: tuple[Tensor, ...],
) -> None:
    """Captures the weights of a module by which the text attends to visual tokens beside the LLM's
    own attention."""
    weights = reader.visual_weights(args[0])[0, :, -capture.rows :]
    capture.weights[layer] = weights.mean(0)


def attend_and_capture(
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes what the attention function `plain` of transformers does.

    Shapes as of `hyperattention.attend`.
    """
    capture = ACTIVE.get()
    layer: Any = getattr(module, "layer_idx", None)
    is_plain = all(kwargs.get(name) is None for name in NOT_PLAIN)
    # a mask with numbers above 0 is a bias (Doge)
    if attention_mask is not None and attention_mask.is_floating_point():
        is_plain = is_plain and not bool((attention_mask > 0).any())
    if capture is not None and layer in capture.layers and is_plain:
        last = query[:, :, -capture.rows :]
        # the mask has a row for each position of the prompt, and only the last ones are captured
        mask = text_mask(attention_mask, query, key)[:, :, -capture.rows :]
        scaling = kwargs.get("scaling") or query.shape[3] ** -0.5
        weights = attention_weights(last, key, mask, scaling)
        # grouped heads share values
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        # the gate of hyperattention is computed from it
        text = (weights.to(value.dtype) @ values).transpose(1, 2).flatten(2)
        call = AttentionCall(
            module,
            last,
            key,
            mask,
            weights,
            text,
            scaling,
            capture.placeholder,
            kwargs.get("visual"),
        )
        capture.weights[layer] = capture.fusion.visual_attention(call)[0].mean(0)
    return attention_function(plain)(module, query, key, value, attention_mask, **kwargs)
