"""N images, P patches, (h, w) their grid, (k, l) the grid that they are averaged to, Q = k * l
visual tokens, Dv vision width, D LLM width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.model.connectors.base import Connector, mlp_layers
from owlfuse.model.parts import check_choice

Place = Literal["before", "after"]
Norm = Literal["none", "layer", "rms"]


class PoolConnector(Connector):
    """The patches averaged to a smaller grid, and linear layers before or after.

    The average is adaptive, torch's `adaptive_avg_pool2d`: cell i of k takes the rows from
    floor(i h / k) to ceil((i + 1) h / k), so that a grid need not be a multiple. Released models:
    Gemma 3 (arXiv 2503.19786) averages, then norms and projects (`pool: before`, `norm: rms`,
    `depth: 1`, `bias: false`); PerceptionLM (arXiv 2504.13180) has an MLP first (`pool: after`,
    `norm: none`, `depth: 2`), and so have the videos of LLaVA-OneVision (arXiv 2408.03326), whose
    bilinear halving of a grid with even sides is this average. Class and register tokens before the
    grid are left out.

    The layers begin as PyTorch's, as in PerceptionLM's code.

    Args:
        size: k = l, or [k, l].
        pool: `before` or `after` the norm and the layers.
        norm: over a token's channels, before the layers: `layer`, `rms` or `none`.
        depth: linear layers, with GELU between them.
        bias: of the linear layers.

    Raises:
        ValueError: a size under 1 or over the backbone's grid, or a depth under 1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        size: int | list[int],
        pool: Place = "before",
        norm: Norm = "layer",
        depth: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sides = [size, size] if isinstance(size, int) else size
        if len(sides) != 2:
            raise ValueError(f"size is {size}, expected one number or two, rows and columns")
        rows, columns = sides
        if min(rows, columns, depth) < 1:
            raise ValueError(f"size ({rows} x {columns}) and depth ({depth}) are each at least 1")
        check_choice("pool", pool, Place)
        check_choice("norm", norm, Norm)
        self.size = (rows, columns)
        self.tokens = rows * columns
        self.set_grid(patches, grid)
        self.pool_first = pool == "before"
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "rms": RMSNorm}
        self.layers = mlp_layers(norms[norm](in_width), in_width, out_width, depth, bias)

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another grid of patches. Raises ValueError where it is smaller than the
        size."""
        if self.size[0] > grid[0] or self.size[1] > grid[1]:
            raise ValueError(
                f"size is {self.size[0]} x {self.size[1]}, which is more than the backbone's grid "
                f"of {grid[0]} x {grid[1]} patches; choose a smaller size or a larger image_size"
            )
        self.grid = (grid[0], grid[1])

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, Q, D)."""
        rows, columns = self.grid
        # tokens that are no patches stand first
        patches = features[:, features.shape[1] - rows * columns :]
        if self.pool_first:
            return self.layers(self.averaged(patches))
        return self.averaged(self.layers(patches))

    def averaged(self, patches: Tensor) -> Tensor:
        """(N, h * w, channels) -> (N, Q, channels)."""
        # torch pools over the last two dimensions
        maps = patches.transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool2d(maps, self.size).flatten(2).transpose(1, 2)

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q, P): the weights of the average."""
        count = self.grid[0] * self.grid[1]
        # each patch alone, averaged: (h * w, Q, 1)
        single = torch.eye(count, device=features.device)[:, :, None]
        shares = self.averaged(single).squeeze(2).T
        shares = F.pad(shares, (features.shape[1] - count, 0))
        return shares.expand(len(features), -1, -1)


class RMSNorm(nn.RMSNorm):
    """torch's, with the 1e-6 of the released models."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)
