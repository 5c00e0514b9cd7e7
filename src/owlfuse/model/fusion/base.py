"""N images, Q visual tokens per image, B rows, I the most images of a row, T text positions, D LLM
width, H query heads, K key-value heads, d head width, R the last positions of a row or places of
logits, S = I * Q visual tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.connectors.base import Connector
from owlfuse.model.layouts import Need
from owlfuse.model.llm import (
    cache_argument,
    forward_positions,
    logits_at,
    mask_argument,
    text_config,
    token_inputs,
)


class Fusion(nn.Module):
    """How visual tokens meet the LLM. Built as `Fusion(connector_tokens=Q, **own arguments)`,
    attached once to one LLM.

    Attributes:
        tokens_per_image: the text positions that an image takes, each held by a placeholder in the
            batch.
    """

    tokens_per_image: int
    splices: ClassVar[bool] = True
    """Whether visual tokens stand in the place of the placeholders, whose own embeddings are then
    never read."""
    levels: int = 0
    """The extra levels of the backbone whose tokens the fusion reads."""
    needs: tuple[Need, ...] = ("inputs_embeds",)
    """What the fusion needs of the LLM, of each of the `visual_attention_layers` where it is about
    layers; checked before it is attached."""
    tensor_roles: ClassVar[dict[str, str]] = {}
    """As `owlfuse.model.llm.TENSOR_ROLES`, of the projections that `attach` adds; `gathered`: the
    input is split by heads, and gathered first."""

    def set_connector_tokens(self, connector_tokens: int) -> None:
        """Goes on with another number of visual tokens per image."""
        self.tokens_per_image = connector_tokens

    def set_levels(self, levels: int, connector: Connector) -> None:
        """Is told once, before `attach`, how many extra levels the backbone gives, and the model's
        connector.

        Raises:
            ValueError: the fusion cannot read so many; by default it reads none.
        """
        if levels:
            raise ValueError(
                f"{type(self).__name__} reads one level of features, and the backbone gives "
                f"{levels} more by themselves; set model.vision.join=channel, or take deepstack"
            )

    def level_connectors(self) -> list[Connector]:
        """Returns the connectors of the extra levels, from the shallowest on; none by default."""
        return []

    def attach(self, llm: PreTrainedModel) -> None:
        """Edits this LLM instance, before adapters and sharding. By default nothing is edited."""

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """Returns the modules inside the LLM that belong to this part, and not to the part
        `llm`."""
        return []

    def closed_gates(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Returns the factors that begin at zero: while they are, no picture is seen. By default
        none."""
        return []

    def per_head(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Returns the parameters that every tensor rank has in full and uses for its own heads
        alone, so that their gradients are summed over ranks."""
        return []

    def check_split(self, llm: PreTrainedModel, ranks: int) -> None:
        """Checks that tensor ranks can share out what `attach` has added. By default nothing is
        checked: it has the LLM's own heads.

        Raises:
            ValueError: so many ranks cannot.
        """

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Computes the LLM's inputs for a batch.

        Args:
            embeddings: (B, T, D) of the text; at a placeholder, the placeholder's own embedding.
            visual: of the full rows, in decoding steps too.
            position_ids: (B, T).

        Returns:
            (B, T, D), and keyword arguments that the LLM's forward passes down to its layers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def visual_attention_layers(self, layers: int) -> list[int]:
        """Returns the indices of the decoder layers, of so many, in which text attends to visual
        tokens. By default all of them."""
        return list(range(layers))

    def visual_attention(self, call: AttentionCall) -> Tensor:
        """Returns how much each head reads from each visual token in one of the
        `visual_attention_layers`: (1, H, R, S), images in order. By default the self-attention's
        weights at the placeholders, for visual tokens that stand among the text."""
        return call.weights[..., call.placeholder]

    def visual_attention_modules(self, llm: PreTrainedModel) -> dict[int, VisualReader]:
        """Returns by layer the modules by which text attends to visual tokens beside the LLM's own
        attention. By default none: `visual_attention` reads the LLM's."""
        return {}


class VisualReader(nn.Module):
    """A module by which hidden states (B, T, D) attend to the visual tokens of the present forward
    pass."""

    def visual_weights(self, hidden_states: Tensor) -> Tensor:
        """Returns how much each head reads from each visual token, (B, H, T, S) float32, for the
        hidden states that the module's forward is given."""
        raise NotImplementedError(f"{type(self).__name__} has no visual_weights")


@dataclass
class AttentionCall:
    """One call of a decoder layer's attention for one row, as seen from its last R positions."""

    module: nn.Module
    query: Tensor
    """(1, H, R, d), rotated."""
    key: Tensor
    """(1, K, T, d), rotated."""
    mask: Tensor
    """(1, 1, R, T) bool, True where a position sees a key."""
    weights: Tensor
    """(1, H, R, T) the self-attention's, float32: softmax(Q K^T * scaling) under the mask."""
    text: Tensor
    """(1, R, H * d) the self-attention's output."""
    scaling: float
    placeholder: Tensor
    """(T,) bool, True at the positions that images take."""
    visual: Any = None
    """The attention's keyword argument `visual`, from the fusion."""


def check_layers(indices: list[int], count: int) -> None:
    """Raises ValueError for indices that are none of so many layers, or not once each."""
    in_range = set(indices) <= set(range(count))
    if not indices or not in_range or len(set(indices)) < len(indices):
        raise ValueError(
            f"layers {indices}: the LLM has {count} layers, 0 to {count - 1}; each at most once"
        )


def attention_weights(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Returns softmax(Q K^T * scaling) over the keys that the mask shows, (B, H, R, T) float32, of
    grouped queries too."""
    # grouped heads share keys
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    # transformers' kernels give no weights
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def text_mask(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask as (B or 1, 1, T, T') bool: where transformers leaves it out, the one that
    its sdpa attention means by that."""
    if attention_mask is not None:
        # a mask of numbers has 0 where a position sees a key, and a large negative one elsewhere
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    steps, length = query.shape[2], key.shape[2]
    # a single step sees all that the cache holds
    if steps == 1:
        return torch.ones(1, 1, 1, length, dtype=torch.bool, device=query.device)
    # several begin the row: keys behind them are the empty places of a static cache
    index = torch.arange(length, device=query.device)
    return (index[None, :] <= index[:steps, None])[None, None]


def splice(embeddings: Tensor, visual: VisualTokens, batch: Batch) -> Tensor:
    """Returns the embeddings (B, T, D) with the visual tokens (N, Q, D) of each row's images at its
    placeholders.

    One gather and one selection of fixed shapes. Rows may share images, as beams do.
    """
    width = visual.tokens.shape[2]
    tokens = visual.tokens.reshape(-1, width)[token_order(visual, batch)]
    return torch.where(batch.placeholder[..., None], tokens.to(embeddings.dtype), embeddings)


def token_order(visual: VisualTokens, batch: Batch) -> Tensor:
    """Returns which of the N * Q visual tokens stands at each placeholder of the batch's
    `input_ids`, (B, T); 0 at text."""
    slot, offset = image_slots(visual, id_positions(batch))
    order = visual.image_index.gather(1, slot) * visual.tokens.shape[1] + offset
    # elsewhere the index may lie outside of the tokens
    return torch.where(batch.placeholder, order, 0)


def id_positions(batch: Batch) -> Tensor:
    """Returns the positions in their rows of a batch's `input_ids`, (T,)."""
    length, steps = batch.attention_mask.shape[1], batch.input_ids.shape[1]
    # behind a cache the ids are the last ones of the row
    return torch.arange(length - steps, length, device=batch.input_ids.device)


def image_slots(visual: VisualTokens, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index in its row of the last image that has started at each of the positions
    (T,), 0 where none has, and how many positions behind its start that is; (B, T) each."""
    has_started = visual.image_positions[:, None] <= positions[:, None]  # (B, T, I)
    # a row's images are in order
    slot = (has_started.sum(-1) - 1).clamp_min(0)
    return slot, positions - visual.image_positions.gather(1, slot)


def visible_images(visual: VisualTokens, batch: Batch) -> Tensor:
    """Returns which of its row's images each of the batch's `input_ids` sees, (B, T, I) bool: those
    that begin at or before it, in its own sample."""
    visible = visual.image_positions[:, None, :] <= id_positions(batch)[:, None]
    visible &= visual.image_index[:, None, :] >= 0
    # packed rows, which are refused with a cache: samples see their own images alone
    if batch.segment_ids is not None:
        starts = first_positions(visual, batch.attention_mask.shape[1])
        image_segments = batch.segment_ids.gather(1, starts)
        visible &= image_segments[:, None, :] == batch.segment_ids[:, :, None]
    return visible


def first_positions(visual: VisualTokens, length: int) -> Tensor:
    """Returns where each row's images begin, (B, I), as indices of a row of so many positions: T,
    for none, is no index."""
    return visual.image_positions.clamp(0, length - 1)


def row_tokens(visual: VisualTokens, dtype: torch.dtype) -> Tensor:
    """Returns the visual tokens of each row's images, (B, S, D). Rows with fewer images than others
    get the first one, which `visible_images` hides."""
    # -1, for none, would be the last image
    return visual.tokens[visual.image_index.clamp(0)].flatten(1, 2).to(dtype)


def embedded(llm: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Returns the embeddings (B, T, D) of ids (B, T), as the LLM's own forward makes them."""
    embeddings = llm.get_input_embeddings()(input_ids)
    config = text_config(llm)
    # Falcon-H1 scales them in its forward, and only where it is given ids.
    if config.model_type == "falcon_h1":
        embeddings = embeddings * config.embedding_multiplier
    return embeddings


def fused_output(
    llm: PreTrainedModel,
    fusion: Fusion,
    batch: Batch,
    visual: VisualTokens,
    cache: Any = None,
    logits_to_keep: int | Tensor = 0,
    **options: Any,
) -> Any:
    """Returns the output of an LLM that the fusion is attached to, for a batch and its visual
    tokens.

    Args:
        cache, logits_to_keep: see `MultimodalLM.forward`. Logits at positions are (1, R, V).
        options: further arguments of the LLM's forward.
    """
    steps = batch.input_ids.shape[1]
    # of padded and packed rows too, where a count over the row would be wrong
    position_ids = batch.positions()[:, -steps:]
    embeddings = embedded(llm, batch.input_ids)
    embeddings, arguments = fusion(embeddings, visual, batch, position_ids, llm)
    if cache is not None:
        arguments[cache_argument(llm)] = cache
    arguments.update(forward_positions(llm, position_ids))
    # the LLM is given embeddings, from which it cannot know the ids
    arguments.update(token_inputs(llm, batch.input_ids, batch.placeholder))
    with logits_at(llm, logits_to_keep):
        return llm(
            inputs_embeds=embeddings,
            attention_mask=mask_argument(llm, batch, cache),
            use_cache=cache is not None,
            **arguments,
            **options,
        )
