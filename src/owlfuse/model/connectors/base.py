"""What a connector is. N images, P patches, Q visual tokens per image, Dv vision width, D LLM
width."""

from __future__ import annotations

import torch
from torch import Tensor

from owlfuse.model.parts import ModelPart


class Connector(ModelPart):
    """Features (N, P, Dv) -> visual tokens (N, Q, D). Built as `Connector(in_width=Dv,
    out_width=D, patches=P, grid=(h, w), **own arguments)`, of which the first four come from the
    other parts.

    Attributes:
        tokens: Q.
    """

    tokens: int

    def forward(self, features: Tensor) -> Tensor:
        """Returns the visual tokens of features."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another grid of patches, for pictures of another size.

        Raises:
            ValueError: the connector cannot, as by default.
        """
        raise ValueError(
            f"{type(self).__name__} has no set_grid, and pictures of another size need it"
        )

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q, P) of which patches each visual token is made, for the maps of
        `owlfuse.evaluation.explain`: by default each of its own patch.

        Raises:
            ValueError: there are other tokens than patches, and the connector does not say.
        """
        patches = features.shape[1]
        if self.tokens != patches:
            raise ValueError(
                f"{type(self).__name__} makes {self.tokens} tokens of {patches} patches, and has "
                "no patch_shares that says of which; see owlfuse.model.connectors"
            )
        return torch.eye(patches, device=features.device).expand(len(features), -1, -1)
