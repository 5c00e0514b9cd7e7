"""N images, Q visual tokens per image, B rows, T text positions, D LLM width."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import Fusion, splice
from owlfuse.model.llm import width


class Pooled(Fusion):
    """An image takes one text position, which holds the mean of its visual tokens, times a
    learned vector."""

    tokens_per_image = 1

    def __init__(self, connector_tokens: int) -> None:
        super().__init__()

    def set_connector_tokens(self, connector_tokens: int) -> None:
        """See `Fusion`. An image stays one text position."""

    def attach(self, llm: PreTrainedModel) -> None:
        """Nothing of the LLM is edited; only its width is needed."""
        self.scale = nn.Parameter(torch.ones(width(llm)))

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """See `Fusion.forward`."""
        pooled = visual.tokens.mean(dim=1, keepdim=True) * self.scale  # (N, 1, D)
        return splice(embeddings, replace(visual, tokens=pooled), batch), {}
