"""Fixed sin-cos tables of positions, as the released mPLUG-Owl2 abstractor has them."""

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """Fixed table (len(positions), width): sines, then cosines, of positions over 10000^(2i/width)."""
    frequencies = 1 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(grid: tuple[int, int], patches: int, width: int) -> Tensor:
    """Fixed table (patches, width): half of the width for the column, half for the row; zero for tokens before the grid's
    (the class token). Backbones whose tokens are no such grid get a table along the sequence."""
    rows, columns = grid
    before = patches - rows * columns
    if before < 0:
        return sincos_1d(torch.arange(patches), width)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    table = torch.cat([sincos_1d(column.flatten(), width // 2), sincos_1d(row.flatten(), width // 2)], dim=1)
    return torch.cat([torch.zeros(before, width), table])
