"""N images, P patches, Dv vision width, H and W the picture's size in pixels."""

import torch
from torch import Tensor, nn

from owlfuse.model.vision.base import Backbone, Preprocessing


class ColorGrid(Backbone):
    """A backbone of one layer: the mean and the variance of the colors in each cell of a grid,
    projected.

    Args:
        side: cells in a row and in a column.
        width: Dv.
        image_size: side in pixels.

    Raises:
        ValueError: a side that does not divide the picture.
    """

    def __init__(self, side: int = 8, width: int = 64, image_size: int = 64) -> None:
        super().__init__()
        if image_size % side:
            raise ValueError(f"side is {side}, which does not divide an image_size of {image_size}")
        self.width = width
        self.patches = side * side
        self.grid = (side, side)
        self.preprocessing = Preprocessing(
            (image_size, image_size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"
        )
        self.pool = nn.AvgPool2d(image_size // side)
        self.proj = nn.Linear(6, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, P, Dv)."""
        mean = self.pool(pixels)
        variance = self.pool(pixels.square()) - mean.square()
        return self.proj(torch.cat([mean, variance], dim=1).flatten(2).transpose(1, 2))
