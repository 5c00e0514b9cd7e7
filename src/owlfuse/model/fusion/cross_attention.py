"""N images, Q visual tokens per image, B rows, I the most images of a row, T text positions, D LLM
width, F hidden units of the MLP, H query heads, K key-value heads, d head width, S = I * Q visual
tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import (
    Fusion,
    VisualReader,
    attention_weights,
    check_layers,
    row_tokens,
    visible_images,
)
from owlfuse.model.fusion.layer_state import ARGUMENT, LayerState
from owlfuse.model.layouts import (
    Need,
    attention_of,
    decoder_layers,
    input_norm_of,
    layout_of,
    mlp_norm_of,
    text_config,
)
from owlfuse.model.llm import shared_field, width
from owlfuse.model.llm_probe import cached_by_configuration, same
from owlfuse.model.parts import check_choice

Place = Literal["before", "after", "parallel"]
Gate = Literal["tanh", "none"]
Sees = Literal["all", "last"]
USUAL_HEAD_WIDTH = 64
"""Of heads beside an LLM whose layers have none, or differ in them."""


class CrossAttention(Fusion):
    """In some decoder layers the text attends to the visual tokens by an attention of its own,
    which is added to the hidden states: the gated cross-attention of Flamingo (arXiv 2204.14198,
    section 2.2), Idefics (arXiv 2306.16527) and Llama 3.2 Vision (arXiv 2407.21783, section 7.2),
    and the rivals that mPLUG-Owl3 compares itself with (arXiv 2408.04840, table 8). An image takes
    one text position, its placeholder. A token that sees no image passes unchanged.

    Visual tokens are not normed, and there are no positions among them, as in these models.

    Args:
        layers: indices of those layers, from 0.
        place: `before`, on the layer's input, as in these models; `parallel`, of the layer's input
            and added to what its self-attention gives; `after`, between its self-attention and its
            MLP.
        gate: `tanh`, what is added times the tanh of a learned number that begins at 0, so that the
            LLM begins unchanged; or `none`.
        sees: what a token sees: `all` images before it, or the `last` one alone, as in Flamingo
            (section 2.3); images whose placeholders stand side by side, as those of a video's
            frames or of tiles do, count as one.
        mlp: whether a gated MLP of its own follows, with the same kind of gate.
        qk_norm: whether queries and keys of each head are normed, as in Llama 3.2 Vision.
        heads: of queries, keys and values, each as wide as the LLM over their number, rounded down;
            by default the LLM's, or of 64 numbers each where its layers have none or differ.

    Raises:
        ValueError: an unknown option; from `attach`, layers that the LLM does not have, none, or
            one twice, or a place that a layer does not have.
    """

    tokens_per_image = 1
    splices = False
    needs: tuple[Need, ...] = ("inputs_embeds", "layers")
    tensor_roles: ClassVar = {
        "visual.q_proj": "columns",
        "visual.k_proj": "columns",
        "visual.v_proj": "columns",
        "visual.o_proj": "rows",
        "visual.gate_proj": "columns",
        "visual.up_proj": "columns",
        "visual.down_proj": "rows",
    }

    def __init__(
        self,
        connector_tokens: int,
        layers: list[int],
        place: Place = "before",
        gate: Gate = "tanh",
        sees: Sees = "all",
        mlp: bool = False,
        qk_norm: bool = False,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("place", place, Place)
        check_choice("gate", gate, Gate)
        check_choice("sees", sees, Sees)
        self.connector_tokens = connector_tokens
        self.layer_indices = sorted(layers)
        self.place = place
        self.gate = gate
        self.sees = sees
        self.mlp = mlp
        self.qk_norm = qk_norm
        self.heads = heads
        # these two hook the attention and the norm before it
        if place != "before":
            self.needs = ("inputs_embeds", "layers", "attention")
        self.state: LayerState[RowImages] = LayerState()

    def set_connector_tokens(self, connector_tokens: int) -> None:
        """Goes on with another number of visual tokens; an image stays one text position."""
        self.connector_tokens = connector_tokens

    def attach(self, llm: PreTrainedModel) -> None:
        """Adds a `CrossAttentionBlock` to each of the layers, and hooks that run it."""
        layers = decoder_layers(llm)
        check_layers(self.layer_indices, len(layers))
        for index in self.layer_indices:
            layer: Any = layers[index]
            block = CrossAttentionBlock(llm, self, index)
            if self.place == "before":
                layer.register_forward_pre_hook(InputUpdate(block), with_kwargs=True)
            else:
                attach_to_attention(llm, layer, block, adds_attention=self.place == "after")
            # below the layer, so that FSDP gathers its parameters with the layer's
            layer.visual = block
        self.state.attach(llm, [layers[index] for index in self.layer_indices])

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """Returns the blocks."""
        return list(blocks_of(llm).values())

    def per_head(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Returns the norms of queries and keys."""
        parameters: list[nn.Parameter] = []
        for block in blocks_of(llm).values():
            # without qk_norm they are an Identity, which has no parameters
            for norm in (block.q_norm, block.k_norm):
                parameters += norm.parameters()
        return parameters

    def check_split(self, llm: PreTrainedModel, ranks: int) -> None:
        """Raises ValueError where so many tensor ranks do not divide the heads or the MLP's hidden
        units."""
        for block in blocks_of(llm).values():
            for name, count in block.split_counts().items():
                if count % ranks:
                    raise ValueError(
                        f"fusion: cross_attention has {count} {name}, which {ranks} tensor ranks "
                        "do not divide"
                    )

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the text embeddings unchanged, and for the layers the visual tokens with their
        visibility."""
        visible = visible_images(visual, batch)
        if self.sees == "last":
            visible = last_images(visible, visual.image_positions)
        sees_any = visible.any(-1, keepdim=True)  # (B, T, 1)
        # a token that sees no image attends to all, so that its softmax is defined; its result is
        # not used
        mask = (visible | ~sees_any).repeat_interleave(self.connector_tokens, dim=2)
        # once keys and values are cached, tokens are not needed
        tokens = None if visual.kv_cache else row_tokens(visual, embeddings.dtype)
        images = RowImages(tokens, mask[:, None], sees_any, visual.kv_cache)
        return embeddings, {ARGUMENT: images}

    def closed_gates(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Returns the gates of the blocks."""
        gates = []
        for block in blocks_of(llm).values():
            gates += [gate for gate in (block.gate, block.mlp_gate) if gate is not None]
        return gates

    def visual_attention_layers(self, layers: int) -> list[int]:
        """Returns the layers that have a block."""
        return self.layer_indices

    def visual_attention_modules(self, llm: PreTrainedModel) -> dict[int, VisualReader]:
        """Returns the blocks by layer."""
        return dict(blocks_of(llm))


def last_images(visible: Tensor, positions: Tensor) -> Tensor:
    """Returns of the images that each token may see the last one, with those side by side with it,
    (B, T, I) bool.

    Args:
        visible: (B, T, I) bool.
        positions: of the images in their rows, (B, I).
    """
    is_first = positions.diff(dim=1, prepend=positions[:, :1] - 2) != 1
    # numbers from 1: 0 is that of no image
    group = is_first.cumsum(1)[:, None]  # (B, 1, I)
    latest = (group * visible).amax(-1, keepdim=True)
    return visible & (group == latest)


class RowImages(NamedTuple):
    """A batch's visual tokens as the layers need them.

    A tuple, through which checkpointing and compilation see the tensors.
    """

    tokens: Tensor | None
    """(B, S, D), not needed once keys and values are cached."""
    mask: Tensor
    """(B, 1, T, S) bool, True where a text token sees a visual one, or sees none at all."""
    sees_any: Tensor
    """(B, T, 1) bool."""
    kv_cache: dict[int, tuple[Tensor, Tensor]] | None
    """In generation: keys and values of each layer, from the first step on."""


class CrossAttentionBlock(VisualReader):
    """The attention to visual tokens in one decoder layer, and the MLP behind it.

    Args:
        index: of the layer.
    """

    def __init__(self, llm: PreTrainedModel, fusion: CrossAttention, index: int) -> None:
        super().__init__()
        size = width(llm)
        heads, groups, head_width = head_counts(llm, fusion.heads)
        table: Any = llm.get_input_embeddings().weight
        # the LLM may be on the meta device, or in half precision
        like = {"device": table.device, "dtype": table.dtype}
        config = text_config(llm)
        eps = shared_field(config, "rms_norm_eps") or 1e-6
        self.index = index
        self.head_width = head_width
        self.state = fusion.state
        linear: Any = partial(nn.Linear, bias=False, **like)
        rms_norm: Any = partial(nn.RMSNorm, eps=eps, **like)
        self.norm = rms_norm(size)
        self.q_proj = linear(size, heads * head_width)
        self.k_proj = linear(size, groups * head_width)
        self.v_proj = linear(size, groups * head_width)
        self.o_proj = linear(heads * head_width, size)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if fusion.qk_norm:
            self.q_norm = rms_norm(head_width)
            self.k_norm = rms_norm(head_width)
        self.gate = zero_gate(fusion.gate, like)
        self.has_mlp = fusion.mlp
        self.mlp_gate: nn.Parameter | None = None
        if fusion.mlp:
            hidden_units = shared_field(config, "intermediate_size")
            # some families have none, or a list by layer
            if not isinstance(hidden_units, int):
                hidden_units = 4 * size
            self.mlp_norm = rms_norm(size)
            self.gate_proj = linear(size, hidden_units)
            self.up_proj = linear(size, hidden_units)
            self.down_proj = linear(hidden_units, size)
            self.mlp_gate = zero_gate(fusion.gate, like)
        # as large as the LLM's own linear layers begin
        std = shared_field(config, "initializer_range") or 0.02
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns what is added to hidden states (B, T, D); zero at tokens that see no image, and
        in a forward pass that was given no images."""
        images = self.state.value
        if images is None:
            return torch.zeros_like(hidden_states)
        return self.update(hidden_states, images)

    def update(self, hidden_states: Tensor, images: RowImages) -> Tensor:
        """Returns the same, (B, T, D), for the images of one forward pass."""
        query = self.query(hidden_states)
        key, value = self.keys_values(images)
        repeats = query.shape[1] // key.shape[1]
        # grouped heads share keys and values; torch's own grouping has no fast kernel with a mask
        attended = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(repeats, dim=1),
            value.repeat_interleave(repeats, dim=1),
            attn_mask=images.mask,
        )
        update = self.o_proj(attended.transpose(1, 2).flatten(2))
        if self.gate is not None:
            update = update * self.gate.tanh()
        if self.has_mlp:
            update = update + self.mlp_update(hidden_states + update)
        # a gate in 32 bits beside an LLM in 16 has made more of them
        update = update.to(hidden_states.dtype)
        return torch.where(images.sees_any, update, torch.zeros_like(update))

    def mlp_update(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), gated."""
        normed = self.mlp_norm(hidden_states)
        update = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return update if self.mlp_gate is None else update * self.mlp_gate.tanh()

    def query(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, d)."""
        # by the width of a head: a tensor rank has a part of the heads
        query = self.q_proj(self.norm(hidden_states)).unflatten(-1, (-1, self.head_width))
        return self.q_norm(query.transpose(1, 2))

    def keys_values(self, images: RowImages) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, K, S, d) of the visual tokens, in generation those of the
        first step."""
        if images.kv_cache and self.index in images.kv_cache:
            return images.kv_cache[self.index]
        assert images.tokens is not None
        key = self.k_proj(images.tokens).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        value = self.v_proj(images.tokens).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        keys_values = self.k_norm(key), value
        if images.kv_cache is not None:
            images.kv_cache[self.index] = keys_values
        return keys_values

    def visual_weights(self, hidden_states: Tensor) -> Tensor:
        """Returns how much each head reads from each visual token, (B, H, T, S) float32, times the
        size of the gate; zero at tokens that see no image."""
        images = self.state.value
        assert images is not None
        key, _ = self.keys_values(images)
        scaling = self.head_width**-0.5
        weights = attention_weights(self.query(hidden_states), key, images.mask, scaling)
        weights = weights * images.sees_any[:, None]
        # a negative gate reads as much as a positive one
        return weights if self.gate is None else weights * self.gate.tanh().abs().float()

    def split_counts(self) -> dict[str, int]:
        """Returns what tensor ranks have to divide."""
        counts = {
            "heads": self.q_proj.out_features // self.head_width,
            "key-value heads": self.k_proj.out_features // self.head_width,
        }
        if self.has_mlp:
            counts["hidden units"] = self.up_proj.out_features
        return counts


def zero_gate(gate: Gate, like: dict[str, Any]) -> nn.Parameter | None:
    """Returns the number whose tanh is a gate, closed at first; none for an update without."""
    return nn.Parameter(torch.zeros(1, **like)) if gate == "tanh" else None


def head_counts(llm: PreTrainedModel, heads: int | None) -> tuple[int, int, int]:
    """Returns H, K and d: those of the LLM, or of `heads` without groups.

    Raises:
        ValueError: no heads.
    """
    size = width(llm)
    if heads is None:
        config = text_config(llm)
        heads = shared_field(config, "num_attention_heads")
        groups = shared_field(config, "num_key_value_heads") or heads
        head_width = shared_field(config, "head_dim")
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0:
            if isinstance(head_width, int):
                return heads, groups, head_width
        else:
            # Mamba's layers have no heads, and where layers differ there is a list or nothing
            heads = groups = max(size // USUAL_HEAD_WIDTH, 1)
    else:
        groups = heads
    if heads < 1:
        raise ValueError(f"heads: {heads} is no number of heads; give 1 or more")
    # rounded down: the tiny copies that fusions are tried on have other widths
    return heads, groups, max(size // heads, 1)


def blocks_of(llm: PreTrainedModel) -> dict[int, CrossAttentionBlock]:
    """Returns the blocks of an LLM by layer."""
    blocks = {}
    for module in llm.modules():
        if isinstance(module, CrossAttentionBlock):
            blocks[module.index] = module
    return blocks


def attach_to_attention(
    llm: PreTrainedModel, layer: Any, block: CrossAttentionBlock, adds_attention: bool
) -> None:
    """Adds what the block gives to what the layer's self-attention gives.

    Args:
        adds_attention: whether the block reads the layer's input with the self-attention's result
            added, which the MLP reads, instead of the input alone.

    Raises:
        ValueError: the layer has no attention or no norm before it, or, with `adds_attention`, its
            MLP reads something else than that sum.
    """
    norm = input_norm_of(llm, layer)
    if norm is None:
        raise ValueError(
            f"place: layer {block.index} of {type(llm).__name__} has no norm before its "
            "self-attention; take before"
        )
    layout = layout_of(llm)
    if layout.output and not layout.output.startswith(f"{layout.attention}."):
        # BERT-like layers multiply what the attention gives by a module behind it
        raise ValueError(
            f"place: layer {block.index} of {type(llm).__name__} projects its self-attention's "
            "result in a module behind it; take before"
        )
    update = AttentionUpdate(block, adds_attention)
    norm.register_forward_pre_hook(update.keep_input)
    attention_of(llm, layer).register_forward_hook(update.add)
    if adds_attention and not plain_residuals(llm)[block.index]:
        raise ValueError(
            f"place: after: layer {block.index} of {type(llm).__name__} has no plain sum of its "
            "input and its self-attention before its MLP; take before or parallel"
        )


class InputUpdate:
    """A hook that changes a decoder layer's hidden states before its forward."""

    def __init__(self, block: CrossAttentionBlock) -> None:
        self.block = block

    def __call__(
        self, layer: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments of the layer's forward with other hidden states."""
        # families differ in whether hidden states come by position or by name
        hidden_states = args[0] if args else kwargs["hidden_states"]
        images = self.block.state.value
        recomputes = getattr(layer, "gradient_checkpointing", False) and layer.training
        if recomputes and torch.is_grad_enabled() and images is not None:
            # transformers checkpoints a layer's forward, and not the hooks around it; the images
            # are an argument, so that the recomputation has those of this forward pass
            update = checkpoint(self.block.update, hidden_states, images, use_reentrant=False)
        else:
            update = self.block(hidden_states)
        hidden_states = hidden_states + update
        if args:
            return (hidden_states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_states}


class AttentionUpdate:
    """Two hooks of one layer: one keeps the layer's input, the other changes what the
    self-attention gives. Both run inside of the layer's forward, and so again where that is
    repeated."""

    def __init__(self, block: CrossAttentionBlock, adds_attention: bool) -> None:
        self.block = block
        self.adds_attention = adds_attention
        self.layer_input: Tensor | None = None

    def keep_input(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keeps what the layer's input norm reads."""
        self.layer_input = args[0]

    def add(self, attention: nn.Module, args: tuple, output: Any) -> Any:
        """Returns the attention's output, (B, T, D) or a tuple that begins with it, with the
        block's update added."""
        attended = output[0] if isinstance(output, tuple) else output
        # not kept for longer, since it holds memory of the backward pass
        hidden_states, self.layer_input = self.layer_input, None
        if hidden_states is None:
            # BART's first norm comes behind its attention, though it has the name of one before
            raise RuntimeError(
                "the first norm of its layers comes behind their attention; take place: before"
            )
        # the layer adds its input to what comes out here, so this is what its MLP would read
        if self.adds_attention:
            hidden_states = hidden_states + attended
        attended = attended + self.block(hidden_states)
        return (attended, *output[1:]) if isinstance(output, tuple) else attended


@cached_by_configuration
def plain_residuals(llm: PreTrainedModel) -> list[bool]:
    """Returns of each decoder layer whether its MLP's norm reads the sum of the layer's input and
    its self-attention's result: tried on a tiny copy of the LLM."""
    layers = decoder_layers(llm)
    sums: dict[int, list[Tensor]] = {}
    for index, layer in enumerate(layers):
        try:
            norms = input_norm_of(llm, layer), mlp_norm_of(llm, layer)
            attention = attention_of(llm, layer)
        except ValueError:  # a layer without attention
            continue
        # no norm to read the sum at, or one norm before both, side by side
        if None in norms or norms[0] is norms[1]:
            continue
        tensors = sums.setdefault(index, [])
        for module in (*norms, attention):
            assert module is not None
            is_norm = module is not attention
            # never removed: this copy of the LLM is the probe's alone
            module.register_forward_hook(recorder(tensors, is_norm))
    llm(input_ids=torch.arange(10, 17)[None], use_cache=False)
    residuals = []
    for index in range(len(layers)):
        tensors = sums.get(index, [])
        # layer input, attention's result, and what the MLP's norm reads, in the order of the calls
        is_plain = False
        # another number: a module is called twice, or never
        if len(tensors) == 3:
            layer_input, attended, mlp_input = tensors
            # OPT's MLP reads the rows of a batch as one
            expected = (layer_input + attended).flatten(0, 1)
            is_plain = same(expected, mlp_input.reshape(-1, mlp_input.shape[-1]))
        residuals.append(is_plain)
    return residuals


def recorder(tensors: list[Tensor], takes_input: bool) -> Callable[..., None]:
    """Returns a forward hook that appends a module's input, or its output."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if takes_input:
            tensors.append(args[0])
        else:
            tensors.append(output[0] if isinstance(output, tuple) else output)

    return hook
