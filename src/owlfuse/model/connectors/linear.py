"""N images, P patches, Dv vision width, D LLM width."""

from torch import Tensor, nn

from owlfuse.model.connectors.base import Connector


class LinearConnector(Connector):
    """One linear layer a patch, as mPLUG-Owl3's 7B-240728 `vision2text_model` (arXiv 2408.04840): Q
    = P.

    Args:
        norm: a LayerNorm before it, for backbones whose last block is not normed (most
            convolutional ones).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = patches
        self.norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        self.proj = nn.Linear(in_width, out_width)

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another number of patches."""
        self.tokens = patches

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, P, D)."""
        return self.proj(self.norm(features))
