"""N images, P patches, Dv vision width, D LLM width."""

from torch import Tensor, nn

from owlfuse.model.connectors.base import Connector


class MeanConnector(Connector):
    """One visual token an image: the mean of its patches, projected."""

    def __init__(self, in_width: int, out_width: int, patches: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = 1
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, 1, D)."""
        return self.proj(features.mean(dim=1, keepdim=True))
