"""N images, P patches, Dv vision width, D LLM width."""

from torch import Tensor, nn

from owlfuse.model.connectors.base import Connector, mlp_layers


class MLPConnector(Connector):
    """Linear layers with GELU between them, a patch at a time: Q = P. With depth 2, mPLUG-Owl3's
    241101 `vision2text_model`.

    Args:
        depth: linear layers.
        norm: a LayerNorm before them, for backbones whose last block is not normed (most
            convolutional ones).

    Raises:
        ValueError: depth under 1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}, and an MLP has at least 1 layer")
        self.tokens = patches
        first_norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        self.layers = mlp_layers(first_norm, in_width, out_width, depth)

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another number of patches."""
        self.tokens = patches

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, P, D)."""
        return self.layers(features)
