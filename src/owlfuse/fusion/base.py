"""N images, Q visual tokens per image, B rows, I the most images of a row, T text positions, D LLM width."""

from __future__ import annotations

from typing import Any

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

    def attach(self, llm: PreTrainedModel) -> None:
        """Edits this LLM instance, before adapters and sharding. By default nothing is edited."""

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """The modules inside the LLM that belong to this part, and not to the part `llm`."""
        return []

    def forward(
        self, embeddings: Tensor, visual: VisualTokens | None, batch: Batch, position_ids: Tensor, llm: PreTrainedModel
    ) -> tuple[Tensor, dict[str, Any]]:
        """The LLM's inputs for a batch.

        Args:
            embeddings: (B, T, D) of the text; what stands at a placeholder is the placeholder's own embedding.
            visual: None in a decoding step of a batch whose images were seen before.
            position_ids: (B, T).

        Returns:
            (B, T, D), and keyword arguments that the LLM's forward passes down to its layers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")


def splice(embeddings: Tensor, visual: VisualTokens, placeholder: Tensor) -> Tensor:
    """Puts the visual tokens (N, Q, D), in order, at the placeholders (B, T) of the embeddings (B, T, D).

    One gather and one selection of fixed shapes; the k-th placeholder of the batch takes the k-th visual token.
    """
    flat = visual.tokens.flatten(0, 1)
    order = (placeholder.flatten().cumsum(0) - 1).clamp(0, flat.shape[0] - 1).view_as(placeholder)
    return torch.where(placeholder[..., None], flat[order].to(embeddings.dtype), embeddings)
