"""N images, Q visual tokens per image, B rows, I the most images of a row, T text positions, D LLM
width, H query heads, K key-value heads, d head width, R the last positions of a row, S = I * Q
visual tokens of a row.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import (
    AttentionCall,
    Fusion,
    attention_weights,
    check_layers,
    first_positions,
    row_tokens,
    text_mask,
    visible_images,
)
from owlfuse.model.layouts import (
    KeyValue,
    Need,
    attention_of,
    decoder_layers,
    head_width,
    heads_width,
    input_norm_of,
    key_value_weights,
    layout_of,
)
from owlfuse.model.llm import KeyPath, attention_function, attention_name, rotary
from owlfuse.model.llm_probe import key_paths
from owlfuse.model.parts import check_choice

Gate = Literal["adaptive", "static", "fused", "none"]
Norm = Literal["shared", "own"]


class HyperAttention(Fusion):
    """In a few decoder layers the text query also attends to the visual tokens, in parallel with
    self-attention (mPLUG-Owl3, arXiv 2408.04840). An image takes one text position, its
    placeholder.

    Args:
        layers: indices of those layers, from 0 (released configurations count from 1).
        gate: how the two attentions are joined. `adaptive`: the paper's, eq. 1-2; `static`: one
            learned vector, as in the 240728 checkpoints; `fused`: no gate, visual keys and values
            stand before the text's in one softmax, as in the 241101 checkpoints; `none`: their sum,
            as the bare form of the paper's Table 10.
        norm: which one the visual tokens pass before their projection: `shared`, the layer's input
            norm, or `own`, a copy that is trained by itself.
        mi_rope: whether all patches of an image are turned by the position of its placeholder; else
            they are not turned at all, and stand at position 0 for every query.

    Raises:
        ValueError: from `attach`, layers that the LLM does not have, none, or one twice; flash
            attention, which has no mask that says who sees whom.
    """

    tokens_per_image = 1
    splices = False
    needs: tuple[Need, ...] = (
        "inputs_embeds",
        "layers",
        "attention",
        "separate_keys_values",
    )
    tensor_roles: ClassVar = {"visual.kv_proj": "columns", "visual.gate_proj": "gathered"}

    def __init__(
        self,
        connector_tokens: int,
        layers: list[int],
        gate: Gate = "adaptive",
        norm: Norm = "shared",
        mi_rope: bool = True,
    ) -> None:
        super().__init__()
        check_choice("gate", gate, Gate)
        check_choice("norm", norm, Norm)
        self.connector_tokens = connector_tokens
        self.layer_indices = sorted(layers)
        self.gate = gate
        self.norm = norm
        self.mi_rope = mi_rope

    def set_connector_tokens(self, connector_tokens: int) -> None:
        """Goes on with another number of visual tokens; an image stays one text position."""
        self.connector_tokens = connector_tokens

    def attach(self, llm: PreTrainedModel) -> None:
        """Adds a `VisualAttention` to each of the layers, and makes transformers call `attend` for
        the LLM's attention."""
        plain = attention_name(llm)
        if "flash" in plain:
            raise ValueError(
                f"hyperattention needs masks, which {plain} has not; set model.llm.attention=sdpa"
            )
        layers = decoder_layers(llm)
        indices = self.layer_indices
        check_layers(indices, len(layers))
        layout = layout_of(llm)
        # tried on a tiny copy, before this LLM is changed
        paths = key_paths(llm)
        for index in indices:
            path = paths[index]
            if isinstance(path, str):
                raise ValueError(
                    f"hyperattention cannot make visual keys for {type(llm).__name__}, layer "
                    f"{index}: {path}; choose another LLM, other layers or another fusion"
                )
            layer = layers[index]
            norm = None
            if self.norm == "own":
                norm = deepcopy(input_norm_of(llm, layer))
                if norm is None:
                    raise ValueError(
                        f"norm: own is a copy of the norm before the attention, and "
                        f"{type(llm).__name__} has none; set norm=shared"
                    )
            attention_of(llm, layer).visual = VisualAttention(
                key_value_weights(llm, layer),
                head_width(llm, layer),
                heads_width(llm, layer),
                self.gate,
                norm,
                path,
            )
            assert layout.attention is not None
            hook = partial(project_visual_kv_hook, layout.attention, layout.input_norm, index)
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        name = f"owlfuse_hyperattention_{plain}"
        ALL_ATTENTION_FUNCTIONS.register(name, partial(attend, plain))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
        # registered functions are global, this setting is the LLM's own
        llm.set_attn_implementation(name)

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """Returns the visual key-value projections, gates and norms."""
        return [module for module in llm.modules() if isinstance(module, VisualAttention)]

    def per_head(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Returns the static gates."""
        modules: list[Any] = self.owned(llm)
        return [module.gate for module in modules if module.gate is not None]

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the text embeddings unchanged, and for the layers the visual tokens with their
        rotation and visibility."""
        # a later set_attn_implementation, which transformers offers, would leave pictures out
        implementation = attention_name(llm)
        if "owlfuse_hyperattention" not in implementation:
            raise ValueError(
                f"hyperattention is no longer the LLM's attention, which is {implementation}; load "
                "the model with the attention that is wanted"
            )
        visible = visible_images(visual, batch)
        if visual.kv_cache:
            return embeddings, {"visual": RowVisual(None, None, visible, visual.kv_cache)}
        tokens = row_tokens(visual, embeddings.dtype)  # (B, S, D)
        length = batch.attention_mask.shape[1]
        kv_cache = visual.kv_cache
        later = (visual.image_positions >= length) & (visual.image_index >= 0)
        # of a prompt that comes in chunks, the positions of later images are not known yet
        if kv_cache is not None and later.any():
            kv_cache = None
        starts = first_positions(visual, length)
        # MI-RoPE: all patches of an image have the position of its placeholder; by the batch's
        # positions, not `position_ids`, which lack those that a cache holds
        positions = batch.positions().gather(1, starts)
        positions = positions.repeat_interleave(self.connector_tokens, dim=1) * self.mi_rope
        rotations = self.rotations(llm, tokens, positions, batch.positions())
        return embeddings, {"visual": RowVisual(tokens, rotations, visible, kv_cache)}

    def rotations(
        self, llm: PreTrainedModel, tokens: Tensor, positions: Tensor, row_positions: Tensor
    ) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Returns cosines and sines at `positions` (B, S), once for each of the rotary embeddings
        that the layers have, as they are in rows with `row_positions` (B, T)."""
        layers: Any = decoder_layers(llm)
        layer_types = set()
        for index in self.layer_indices:
            path = attention_of(llm, layers[index]).visual.key_path
            # SmolLM3 has layers that rotate nothing
            if path.rotation != "none":
                layer_types.add(path.layer_type)
        rotations = {}
        count = positions.shape[1]
        # longrope and dynamic ropes choose their frequencies by the longest position of a call
        seen = torch.cat([positions, row_positions], dim=1)
        # by their text, since None does not compare with names
        for layer_type in sorted(layer_types, key=str):
            cos, sin = rotary(llm, tokens, seen, layer_type)
            rotations[layer_type] = cos[:, :count], sin[:, :count]
        return rotations

    def visual_attention_layers(self, layers: int) -> list[int]:
        """Returns the layers that have a visual attention."""
        return self.layer_indices

    def visual_attention(self, call: AttentionCall) -> Tensor:
        """Returns the weights of the attention to the visual tokens, times the gate's mean
        over a head's width; of a fused softmax, its visual part."""
        key, _, visible = call.visual
        mask = visible[:, -call.query.shape[2] :]  # (1, R, I)
        # an image is seen as one, with all of its tokens
        mask = mask.repeat_interleave(self.connector_tokens, dim=2)[:, None]  # (1, 1, R, S)
        if self.gate == "fused":
            keys = torch.cat([key, call.key], dim=2)
            mask = torch.cat([mask, call.mask], dim=3)
            return attention_weights(call.query, keys, mask, call.scaling)[..., : key.shape[2]]
        weights = attention_weights(call.query, key, mask, call.scaling)
        if self.gate == "none":
            return weights
        attention: Any = call.module
        # a static gate is one vector for all tokens
        gate = attention.visual.gate_of(call.text).expand_as(call.text)
        gate = gate.unflatten(2, (call.query.shape[1], -1))  # (1, R, H, d)
        return weights * gate.float().mean(-1).transpose(1, 2)[..., None]


@dataclass
class RowVisual:
    """A batch's visual tokens as the layers need them."""

    tokens: Tensor | None
    """(B, S, D), not needed once keys and values are cached."""
    rotations: dict[str | None, tuple[Tensor, Tensor]] | None
    """Rotary cosines and sines of the tokens, (B, S, d) each, by `KeyPath.layer_type`; none
    where no layer rotates its keys."""
    visible: Tensor
    """(B, T, I) which token sees which image."""
    kv_cache: dict[int, tuple[Tensor, Tensor]] | None
    """In generation: keys and values of each layer, from the first step on."""


class VisualAttention(nn.Module):
    """The modules of a hyperattention layer: one projection of visual tokens to keys and values,
    the gate, a norm."""

    def __init__(
        self,
        text: KeyValue,
        head_width: int,
        heads_width: int,
        gate: Gate,
        norm: nn.Module | None,
        key_path: KeyPath,
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.key_path = key_path
        joint: dict[str, Any] = {"device": text.key.device, "dtype": text.key.dtype}
        keys_width, width = text.key.shape
        has_bias = text.key_bias is not None or text.value_bias is not None
        self.kv_proj = nn.Linear(width, 2 * keys_width, bias=has_bias, **joint)
        self.gate = nn.Parameter(torch.zeros(heads_width, **joint)) if gate == "static" else None
        self.gate_proj: Any = (
            nn.Linear(heads_width, heads_width, **joint) if gate == "adaptive" else None
        )
        self.norm = norm
        self.kind = gate
        self.share = (0, 1)
        """The tensor rank, and the number of ranks, each of which has as many of the heads."""
        with torch.no_grad():
            # visual keys and values start as the text's
            self.kv_proj.weight.copy_(self.interleave(text.key, text.value))
            if has_bias:
                # Whisper's keys have none
                zeros = text.key.new_zeros(keys_width)
                key_bias = zeros if text.key_bias is None else text.key_bias
                value_bias = zeros if text.value_bias is None else text.value_bias
                self.kv_proj.bias.copy_(self.interleave(key_bias, value_bias))
            if self.gate_proj is not None:
                # a gate of one half at first: neither attention is shut off
                nn.init.normal_(self.gate_proj.weight, std=0.02)
                nn.init.zeros_(self.gate_proj.bias)

    def interleave(self, key: Tensor, value: Tensor) -> Tensor:
        """Returns rows of the key and value projections in the released layout: per key-value head
        [k; v]."""
        key_heads = key.unflatten(0, (-1, self.head_width))
        value_heads = value.unflatten(0, (-1, self.head_width))
        return torch.cat([key_heads, value_heads], dim=1).flatten(0, 1)

    def keys_values(
        self,
        tokens: Tensor,
        attention: Any,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, K, S, d) of normed tokens (B, S, D). Keys have the norm and
        rotation of the attention's text keys, in the same order."""
        heads = self.kv_proj(tokens).unflatten(-1, (-1, 2 * self.head_width))
        key, value = heads.split(self.head_width, dim=-1)
        turn = None if cos is None or sin is None else (cos, sin)
        # a copy, where a view of keys and values together would keep the unrotated keys until the
        # backward pass
        values = self.key_path.values(attention, value).contiguous()
        return self.key_path.keys(attention, key, turn), values

    def join(self, text: Tensor, visual: Tensor) -> Tensor:
        """Returns the two attentions' outputs (B, T, H * d), gated: visual * g + text * (1 - g), or
        their sum without a gate."""
        if self.kind == "none":
            return visual + text
        gate = self.gate_of(text)
        return visual * gate + text * (1 - gate)

    def gate_of(self, text: Tensor) -> Tensor:
        """Returns the weight of the visual attention, from 0 to 1: (B, T, H * d), or (H * d,) where
        it is the same for all tokens."""
        if self.gate is None:
            return torch.sigmoid(self.gate_proj(text))
        rank, ranks = self.share
        return torch.sigmoid(self.gate.chunk(ranks)[rank])


def project_visual_kv_hook(
    attention_path: str,
    norm_path: str | None,
    index: int,
    layer: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """Replaces the visual tokens by the visual keys and values of this layer. A hook on the layer,
    since the layer's input norm (unless it is not shared) comes before the projection, and the
    attention has no access to it."""
    row: RowVisual | None = kwargs.get("visual")
    if row is None:
        return args, kwargs
    attention: Any = layer.get_submodule(attention_path)
    # in generation after the first step
    keys_values = row.kv_cache.get(index) if row.kv_cache else None
    if keys_values is None:
        assert row.rotations is not None
        norm = attention.visual.norm
        if norm is None and norm_path is not None:
            norm = layer.get_submodule(norm_path)
        # the attention of OLMo 2 reads what no norm has passed
        tokens = row.tokens if norm is None else norm(row.tokens)
        # none for a layer that rotates nothing
        turn = row.rotations.get(attention.visual.key_path.layer_type, ())
        keys_values = attention.visual.keys_values(tokens, attention, *turn)
        if row.kv_cache is not None:
            row.kv_cache[index] = keys_values
    return args, {**kwargs, "visual": (*keys_values, row.visible)}


def attend(
    plain: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    visual: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes an attention function of transformers: self-attention by `plain`, joined with
    attention to the visual tokens in the layers that have a `VisualAttention`. query (B, H, T, d),
    rotated; key, value (B, K, T', d); out (B, T, H, d).

    A token that sees no image has exactly its self-attention output.
    """
    attention = attention_function(plain)
    text, weights = attention(module, query, key, value, attention_mask, **kwargs)
    # a layer without visual attention, or a text alone
    if visual is None or not hasattr(module, "visual"):
        return text, weights
    visual_key, visual_value, visible = visual
    sees_any = visible.any(-1)[:, :, None, None]  # (B, T, 1, 1)
    per_image = visual_key.shape[2] // max(visible.shape[2], 1)
    mask = visible.repeat_interleave(per_image, dim=2)[:, None]  # (B, 1, T, S)
    if module.visual.kind == "fused":
        text_part = text_mask(attention_mask, query, key).expand(*mask.shape[:3], -1)
        mask = torch.cat([mask, text_part], dim=-1)
        keys = torch.cat([visual_key, key], dim=2)
        values = torch.cat([visual_value, value], dim=2)
        joined, _ = attention(module, query, keys, values, mask, **kwargs)
    else:
        # a token that sees no image attends to all, so that its softmax is defined; its result is
        # not used
        mask = mask | ~sees_any.transpose(1, 2)
        cross, _ = attention(module, query, visual_key, visual_value, mask, **kwargs)
        joined = module.visual.join(text.flatten(2), cross.flatten(2)).view_as(text)
    return torch.where(sees_any, joined, text), weights
