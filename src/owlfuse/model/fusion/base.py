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
from owlfuse.model.llm import cache_argument, logits_at, mask_argument


class Fusion(nn.Module):
    """How visual tokens meet the LLM. Built as `Fusion(connector_tokens=Q, **own arguments)`,
    attached once to one LLM.

    Attributes:
        tokens_per_image: the text positions that an image takes, each held by a placeholder in the
            batch.
    """

    tokens_per_image: int
    tensor_roles: ClassVar[dict[str, str]] = {}
    """As `owlfuse.model.llm.TENSOR_ROLES`, of the projections that `attach` adds; `gathered`: what
    goes in is split by heads, and needed whole."""

    def set_connector_tokens(self, connector_tokens: int) -> None:
        """Goes on with another number of visual tokens per image."""
        self.tokens_per_image = connector_tokens

    def attach(self, llm: PreTrainedModel) -> None:
        """Edits this LLM instance, before adapters and sharding. By default nothing is edited."""

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """The modules inside the LLM that belong to this part, and not to the part `llm`."""
        return []

    def per_head(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Parameters that every tensor rank has whole and uses for its own heads alone, so that
        their gradients add up."""
        return []

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The LLM's inputs for a batch.

        Args:
            embeddings: (B, T, D) of the text; what stands at a placeholder is the placeholder's own
                embedding.
            visual: of the whole rows, in decoding steps too.
            position_ids: (B, T).

        Returns:
            (B, T, D), and keyword arguments that the LLM's forward passes down to its layers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def looking_layers(self, layers: int) -> list[int]:
        """Of an LLM of so many decoder layers, those in which text attends to visual tokens.

        By default all of them.
        """
        return list(range(layers))

    def looks(self, call: AttentionCall) -> Tensor:
        """How much each head reads from each visual token in one of the `looking_layers`: (1, H, R,
        S), images in order. By default the self-attention's weights at the placeholders, for visual
        tokens that stand among the text."""
        return call.weights[..., call.placeholder]


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
    """(1, R, H * d) what the self-attention gives."""
    scaling: float
    placeholder: Tensor
    """(T,) bool, True at the positions that images take."""
    visual: Any = None
    """What the fusion hands to the attention as `visual`."""


def attention_weights(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """softmax(Q K^T * scaling) over the keys that the mask shows, (B, H, R, T) float32, of
    grouped queries too."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def text_mask(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The mask that transformers leaves out where a causal one is meant, as (B or 1, 1, T, T')
    bool."""
    if attention_mask is not None:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    steps, length = query.shape[2], key.shape[2]
    index = torch.arange(length, device=query.device)
    return (index[None, :] <= index[length - steps :, None])[None, None]


def splice(embeddings: Tensor, visual: VisualTokens, batch: Batch) -> Tensor:
    """Puts the visual tokens (N, Q, D) of each row's images at the placeholders of the embeddings
    (B, T, D).

    One gather and one selection of fixed shapes. Rows may share images, as beams do.
    """
    per_image, width = visual.tokens.shape[1:]
    length, steps = batch.attention_mask.shape[1], embeddings.shape[1]
    here = torch.arange(length - steps, length, device=embeddings.device)
    # (B, T, I); a row's images stand in order
    begun = visual.image_positions[:, None] <= here[:, None]
    slot = (begun.sum(-1) - 1).clamp_min(0)  # (B, T) the last image that has begun
    offset = here - visual.image_positions.gather(1, slot)
    order = visual.image_index.gather(1, slot) * per_image + offset
    order = torch.where(batch.placeholder, order, 0)
    tokens = visual.tokens.reshape(-1, width)[order]
    return torch.where(batch.placeholder[..., None], tokens.to(embeddings.dtype), embeddings)


def fused_logits(
    llm: PreTrainedModel, fusion: Fusion, batch: Batch, visual: VisualTokens
) -> Tensor:
    """Logits (B, T, V) of a batch and its visual tokens, by an LLM that the fusion is attached
    to."""
    return fused_output(llm, fusion, batch, visual).logits


def fused_output(
    llm: PreTrainedModel,
    fusion: Fusion,
    batch: Batch,
    visual: VisualTokens,
    cache: Any = None,
    logits_to_keep: int | Tensor = 0,
    **options: Any,
) -> Any:
    """What the forward of an LLM that the fusion is attached to gives for a batch and its visual
    tokens.

    Args:
        cache, logits_to_keep: see `MultimodalLM.forward`. Logits at places are (1, R, V).
        options: further arguments of the LLM's forward.
    """
    steps = batch.input_ids.shape[1]
    position_ids = batch.positions()[:, -steps:]
    embeddings = llm.get_input_embeddings()(batch.input_ids)
    embeddings, arguments = fusion(embeddings, visual, batch, position_ids, llm)
    if cache is not None:
        arguments[cache_argument(llm)] = cache
    places = logits_to_keep if isinstance(logits_to_keep, Tensor) else None
    with logits_at(llm, places):
        return llm(
            inputs_embeds=embeddings,
            attention_mask=mask_argument(llm, batch, cache),
            position_ids=position_ids,
            use_cache=cache is not None,
            logits_to_keep=0 if places is not None else logits_to_keep,
            **arguments,
            **options,
        )
