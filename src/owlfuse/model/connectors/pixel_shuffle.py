"""N images, P patches, (h, w) their grid, r the factor, Q = h / r * w / r visual tokens, Dv vision
width, D LLM width."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.model.connectors.base import Connector, mlp_layers


class PixelShuffleConnector(Connector):
    """The features of r x r neighbouring patches side by side in one token, then linear layers: a
    token has r^2 Dv channels before them, and there are r^2 times fewer tokens than patches.

    With the defaults InternVL's `mlp1` (arXiv 2404.16821, section 3.1, as released since InternVL
    2). With depth 1, no norm and no bias the connector of Idefics3 (arXiv 2408.12637), SmolVLM
    (arXiv 2504.05299) and nanoVLM. A token's channels are those of its patches row by row, the
    channels of a patch together: channel (i * r + j) * Dv + c is channel c of the patch in row i
    and column j of the cell. That is the order of all of these releases, so that their matrices fit
    as they are; `torch.nn.PixelUnshuffle` has another, and InternVL 1.5 wrote the cells themselves
    column by column. Class and register tokens before the grid are left out, as by these models.

    The layers begin as PyTorch's, as in InternVL's training code.

    Args:
        factor: r, patches on a side of a cell.
        depth: linear layers, with GELU between them.
        norm: a LayerNorm over the r^2 Dv channels.
        bias: of the linear layers.

    Raises:
        ValueError: a factor that does not divide both sides of the grid, or a depth or factor under
            1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        factor: int = 2,
        depth: int = 2,
        norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if min(factor, depth) < 1:
            raise ValueError(f"factor ({factor}) and depth ({depth}) are each at least 1")
        self.factor = factor
        self.set_grid(patches, grid)
        cell_width = in_width * factor**2
        first_norm = nn.LayerNorm(cell_width) if norm else nn.Identity()
        self.layers = mlp_layers(first_norm, cell_width, out_width, depth, bias)

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another grid of patches. Raises ValueError where the factor does not divide
        it."""
        rows, columns = grid
        if rows % self.factor or columns % self.factor:
            raise ValueError(
                f"factor is {self.factor}, which does not divide the backbone's grid of {rows} x "
                f"{columns} patches; choose another factor or another image_size"
            )
        self.grid = (rows, columns)
        self.tokens = rows // self.factor * (columns // self.factor)

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, Q, D)."""
        rows, columns = self.grid
        # tokens that are no patches stand first
        patches = features[:, features.shape[1] - rows * columns :]
        cells = patches.unflatten(1, (rows // self.factor, self.factor, -1, self.factor))
        # (N, h / r, w / r, r, r, Dv)
        cells = cells.transpose(2, 3)
        return self.layers(cells.flatten(3).flatten(1, 2))

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q, P): of each patch of a token's cell the same share."""
        rows, columns = self.grid
        cell_row = torch.arange(rows, device=features.device) // self.factor
        cell_column = torch.arange(columns, device=features.device) // self.factor
        cell = cell_row[:, None] * (columns // self.factor) + cell_column
        shares = F.one_hot(cell.flatten(), self.tokens).T / self.factor**2
        shares = F.pad(shares, (features.shape[1] - rows * columns, 0))
        return shares.expand(len(features), -1, -1)
