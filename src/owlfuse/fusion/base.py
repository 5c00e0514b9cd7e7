"""N images, Q visual tokens per image, B rows, I the most images of a row, T text positions, D LLM width."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.types import Batch, VisualTokens


class Fusion(nn.Module):
    """How visual tokens meet the LLM. Built as `Fusion(connector_tokens=Q, **own arguments)`, attached once to one LLM.

    Attributes:
        tokens_per_image: the text positions that an image takes, each held by a placeholder in the batch.
    """

    tokens_per_image: int
    tensor_roles: ClassVar[dict[str, str]] = {}
    """As `owlfuse.llm.TENSOR_ROLES`, of the projections that `attach` adds; `gathered`: what goes in is split by heads, and
    needed whole."""

    def set_connector_tokens(self, connector_tokens: int) -> None:
        """Goes on with another number of visual tokens per image."""
        self.tokens_per_image = connector_tokens

    def attach(self, llm: PreTrainedModel) -> None:
        """Edits this LLM instance, before adapters and sharding. By default nothing is edited."""

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """The modules inside the LLM that belong to this part, and not to the part `llm`."""
        return []

    def per_head(self, llm: PreTrainedModel) -> list[nn.Parameter]:
        """Parameters that every tensor rank has whole and uses for its own heads alone, so that their gradients add up."""
        return []

    def forward(
        self, embeddings: Tensor, visual: VisualTokens, batch: Batch, position_ids: Tensor, llm: PreTrainedModel
    ) -> tuple[Tensor, dict[str, Any]]:
        """The LLM's inputs for a batch.

        Args:
            embeddings: (B, T, D) of the text; what stands at a placeholder is the placeholder's own embedding.
            visual: of the whole rows, in decoding steps too.
            position_ids: (B, T).

        Returns:
            (B, T, D), and keyword arguments that the LLM's forward passes down to its layers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")


def splice(embeddings: Tensor, visual: VisualTokens, batch: Batch) -> Tensor:
    """Puts the visual tokens (N, Q, D) of each row's images at the placeholders of the embeddings (B, T, D).

    One gather and one selection of fixed shapes. Rows may share images, as beams do.
    """
    per_image, width = visual.tokens.shape[1:]
    length, steps = batch.attention_mask.shape[1], embeddings.shape[1]
    here = torch.arange(length - steps, length, device=embeddings.device)
    begun = visual.image_positions[:, None] <= here[:, None]  # (B, T, I); a row's images stand in order
    slot = (begun.sum(-1) - 1).clamp_min(0)  # (B, T) the last image that has begun
    offset = here - visual.image_positions.gather(1, slot)
    order = visual.image_index.gather(1, slot) * per_image + offset
    order = torch.where(batch.placeholder, order, 0)
    tokens = visual.tokens.reshape(-1, width)[order]
    return torch.where(batch.placeholder[..., None], tokens.to(embeddings.dtype), embeddings)
