"""B rows, T text positions, D LLM width."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import Fusion, splice


class Concat(Fusion):
    """Visual tokens stand among the text embeddings, as in mPLUG-Owl (arXiv 2304.14178)."""

    def __init__(self, connector_tokens: int) -> None:
        super().__init__()
        self.tokens_per_image = connector_tokens

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the embeddings with visual tokens among them."""
        return splice(embeddings, visual, batch), {}
