"""N images, P patches, Dv vision width, D LLM width."""

from torch import Tensor, nn

from owlfuse.model.connectors.base import Connector


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
        layers: list[nn.Module] = [
            # an Identity for none, so that the numbers in the names of weights stay
            nn.LayerNorm(in_width) if norm else nn.Identity(),
            nn.Linear(in_width, out_width),
        ]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another number of patches."""
        self.tokens = patches

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, P, D)."""
        return self.layers(features)
