"""Where the things of a picture of *shapes* are, for tests of where a model looks."""

from owlfuse.data.shapes_scenes import Thing

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom lie outside."""


def box_of(thing: Thing) -> Box:
    """The square of `thing.size` pixels that `draw_scene` draws the thing into; it fills most of it."""
    left, top = thing.x - thing.size // 2, thing.y - thing.size // 2
    return left, top, left + thing.size, top + thing.size
