"""The figures of where a model looks in drawn pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from looks import box_of, share_in
from owlfuse.data.shapes.scenes import draw_scene, make_scene


def test_a_box_holds_all_of_its_thing_and_nothing_of_the_others():
    for index in range(40):
        scene = make_scene(0, "val", index)
        pixels = np.asarray(draw_scene(scene)).astype(int)
        drawn = np.abs(pixels - np.array(scene.background)).sum(-1) > 0
        inside = np.zeros_like(drawn)
        for thing in scene.shapes:
            left, top, right, bottom = box_of(thing)
            part = drawn[top:bottom, left:right]
            assert part.any(0).sum() >= 0.6 * thing.size
            assert part.any(1).sum() >= 0.8 * thing.size
            assert not inside[top:bottom, left:right].any()
            inside[top:bottom, left:right] = True
        assert not (drawn & ~inside).any()


def test_a_share_in_a_box_is_that_of_the_pixels():
    map = torch.rand(3, 4)
    fine = np.asarray(
        Image.fromarray(map.numpy()).resize((120, 60), Image.Resampling.NEAREST), dtype=float
    )
    for box in ((0, 0, 120, 60), (7, 3, 50, 41), (30, 20, 60, 40), (100, 59, 119, 60)):
        left, top, right, bottom = box
        assert share_in(map, box, (120, 60)) == pytest.approx(
            fine[top:bottom, left:right].sum() / fine.sum(), rel=1e-5
        )
