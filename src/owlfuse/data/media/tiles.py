"""High resolution by tiling: a picture becomes a global view and the tiles of the grid that fits
its shape best."""

from __future__ import annotations

import hashlib
from fractions import Fraction

from PIL import Image

from owlfuse.core.errors import ConfigError

# (rows, columns) that a picture may be cut into.
GRIDS = ((2, 2), (1, 3), (1, 4), (3, 1), (4, 1), (2, 3), (3, 2))


def is_tiled(share: float, seed: int, sample: str) -> bool:
    """Whether a sample's pictures are tiled, where a `share` (0 to 1) of the samples is: the same
    for the same seed and sample id, in any worker, rank and repeat."""
    # Ids of data may hold lone surrogates, which UTF-8 refuses.
    key = f"{seed} {sample}".encode("utf-8", "surrogatepass")
    # not Python's hash(), which differs between processes
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def check_tiled(resize: str) -> None:
    """Raise ConfigError where a picture may not be tiled: its tiles are resized to a view each, and
    bars or cuts between them are in no model."""
    if resize != "stretch":
        raise ConfigError(
            f"pictures are tiled, and model.vision.resize is {resize}; set it to stretch (the "
            "tiles of the best grid are stretched least), or tile to 0"
        )


def best_grid(picture: tuple[int, int], view: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (rows, columns) of GRIDS whose tiles change the picture's aspect ratio least when
    each is resized to a view.

    Of grids that change it equally, the one that keeps more of the picture's pixels, then the one
    of fewer tiles.

    Args:
        picture: (width, height) in pixels.
        view: (height, width) in pixels of what the backbone sees.

    Returns:
        None for a picture with fewer pixels on a side than every grid has tiles there.
    """
    width, height = picture

    def rank(grid: tuple[int, int]) -> tuple[Fraction, Fraction, int]:
        rows, columns = grid
        grid_width, grid_height = columns * view[1], rows * view[0]
        stretch = Fraction(width * grid_height, height * grid_width)
        # fractions, so that equal grids compare as equal
        scale = min(Fraction(grid_width, width), Fraction(grid_height, height), Fraction(1))
        return max(stretch, 1 / stretch), -scale, rows * columns

    grids = [grid for grid in GRIDS if grid[0] <= height and grid[1] <= width]
    return min(grids, key=rank, default=None)


def views_of(picture: Image.Image, view: tuple[int, int]) -> list[Image.Image]:
    """Return the whole picture first, then the tiles of its best grid row by row. Every pixel is in
    exactly one tile; tiles differ by at most one pixel a side, and are not resized yet.

    Args:
        view: (height, width) in pixels of what the backbone sees.
    """
    grid = best_grid(picture.size, view)
    if grid is None:
        return [picture]
    rows, columns = grid
    x = [picture.width * column // columns for column in range(columns + 1)]
    y = [picture.height * row // rows for row in range(rows + 1)]
    views = [picture]
    for row in range(rows):
        for column in range(columns):
            box = x[column], y[row], x[column + 1], y[row + 1]
            views.append(picture.crop(box))
    return views
