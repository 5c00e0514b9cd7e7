"""Fixed sin-cos tables of positions."""

import math

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, width: int, temperature: float = 10000) -> Tensor:
    """Returns a fixed table (len(positions), width): sines, then cosines, of positions over
    temperature^(2i/width)."""
    # in float64, so that the table is rounded once
    frequencies = 1 / temperature ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(grid: tuple[int, int], patches: int, width: int) -> Tensor:
    """Returns the released mPLUG-Owl2 abstractor's table (patches, width): half of the width for
    the column, half for the row; zero for tokens before the grid's (the class token). Backbones
    whose tokens are no such grid get a table along the sequence."""
    rows, columns = grid
    if patches < rows * columns:
        return sincos_1d(torch.arange(patches), width)
    return grid_table(torch.arange(rows), torch.arange(columns), patches, width)


def sincos_2d_spread(grid: tuple[int, int], patches: int, width: int) -> Tensor:
    """Returns a table (patches, width) of positions relative to the grid: patches of a grid of any
    size are far apart.

    Half of the width for the column, half for the row, each scaled to 0..2 pi as in DETR (arXiv
    2005.12872), with the temperature of 20 of DAB-DETR (arXiv 2201.12329). Zero for tokens before
    the grid's.
    """
    # the middle of a patch, so that grids of all sizes span the same range
    rows, columns = [2 * math.pi * (torch.arange(n) + 0.5) / n for n in grid]
    return grid_table(rows, columns, patches, width, temperature=20)


def grid_table(
    rows: Tensor, columns: Tensor, patches: int, width: int, temperature: float = 10000
) -> Tensor:
    """Returns a table (patches, width) of a grid's positions, half of the width for the column,
    half for the row; zero for tokens before the grid's."""
    # patches come row by row
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    column_table = sincos_1d(column.flatten(), width // 2, temperature)
    row_table = sincos_1d(row.flatten(), width // 2, temperature)
    table = torch.cat([column_table, row_table], dim=1)
    return torch.cat([torch.zeros(patches - len(table), width), table])
