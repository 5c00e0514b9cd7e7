"""Tiling: which samples, which grid, and that no pixel is lost."""

import math

import numpy as np
import pytest
from PIL import Image

from owlfuse.data.media.tiles import GRIDS, best_grid, is_tiled, views_of


def test_the_grids_are_those_of_the_issue():
    assert sorted(GRIDS) == sorted([(2, 2), (1, 3), (1, 4), (3, 1), (4, 1), (2, 3), (3, 2)])


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (2, 2)),
        ((300, 100), (1, 3)),
        ((400, 100), (1, 4)),
        ((2000, 100), (1, 4)),
        ((100, 300), (3, 1)),
        ((100, 900), (4, 1)),
        ((150, 100), (2, 3)),
        ((640, 480), (2, 3)),
        ((480, 640), (3, 2)),
        ((110, 100), (2, 2)),
        ((10000, 1), (1, 4)),
        ((1, 10000), (4, 1)),
        ((2, 2), (2, 2)),
        ((1, 1), None),
    ],
)
def test_a_picture_is_cut_into_the_grid_of_its_shape(size, grid):
    assert best_grid(size, (32, 32)) == grid


def test_the_best_grid_is_that_of_the_nearest_aspect_ratio_on_a_logarithmic_scale():
    rng = np.random.default_rng(0)
    for width, height, view_height, view_width in rng.integers(4, 3000, (300, 4)).tolist():
        stretch = [
            abs(math.log(width * r * view_height / (height * c * view_width))) for r, c in GRIDS
        ]
        rows, columns = best_grid((width, height), (view_height, view_width))
        assert stretch[GRIDS.index((rows, columns))] == pytest.approx(min(stretch), abs=1e-9)


def test_of_equally_good_grids_the_one_that_keeps_more_pixels_is_taken(monkeypatch):
    monkeypatch.setattr("owlfuse.data.media.tiles.GRIDS", ((1, 2), (2, 4), (3, 6)))
    assert best_grid((1000, 500), (100, 100)) == (3, 6)
    assert best_grid((400, 200), (100, 100)) == (2, 4)
    assert best_grid((150, 75), (100, 100)) == (1, 2)


@pytest.mark.parametrize("size", [(64, 64), (97, 31), (31, 97), (61, 43), (4, 1), (5, 2)])
def test_the_global_view_comes_first_and_then_tiles_row_by_row_that_hold_every_pixel_once(size):
    pixels = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    picture = Image.fromarray(pixels)
    whole, *tiles = views_of(picture, (32, 32))
    rows, columns = best_grid(size, (32, 32))
    assert len(tiles) == rows * columns
    assert np.array_equal(np.asarray(whole), pixels)
    together = np.concatenate(
        [
            np.concatenate(
                [np.asarray(tile) for tile in tiles[r * columns : (r + 1) * columns]], axis=1
            )
            for r in range(rows)
        ]
    )
    assert np.array_equal(together, pixels)
    assert max(t.width for t in tiles) - min(t.width for t in tiles) <= 1
    assert max(t.height for t in tiles) - min(t.height for t in tiles) <= 1


def test_a_picture_too_small_for_every_grid_is_one_view():
    assert len(views_of(Image.new("RGB", (1, 1)), (32, 32))) == 1


def test_a_share_of_the_samples_is_tiled_by_seed_and_id():
    ids = [f"s:{i}" for i in range(4000)]
    tiled = [is_tiled(0.3, 7, i) for i in ids]
    assert abs(sum(tiled) / len(ids) - 0.3) < 0.03
    assert tiled == [is_tiled(0.3, 7, i) for i in ids]
    assert tiled != [is_tiled(0.3, 8, i) for i in ids]
    assert all(is_tiled(0.6, 7, i) for i, one in zip(ids, tiled) if one)
    assert all(is_tiled(1.0, 7, i) and not is_tiled(0.0, 7, i) for i in ids)
    assert isinstance(is_tiled(0.5, 0, "lone \ud800"), bool)
