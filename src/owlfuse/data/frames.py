"""Which frames of a video are chosen, by when they are shown or by what they look like.

F frames, P numbers of a small frame.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import numpy as np

BLOCK = 4096
"""Small frames compared at a time."""


def fps_indices(times: list[float], fps: float, frames: int) -> list[int]:
    """A frame every 1 / `fps` seconds from the first on, ascending; `uniform_indices` where those are more than `frames`.

    Args:
        times: seconds at which the frames are shown, from 0 on, and the end of the last.
    """
    *shown, end = times
    wanted = max(1, int(end * fps + 1e-6))
    if wanted > frames:
        return uniform_indices(times, frames)
    return sorted({max(0, bisect_right(shown, k / fps + 1e-6) - 1) for k in range(wanted)})


def uniform_indices(times: list[float], frames: int) -> list[int]:
    """What is shown at the middles of `frames` equal parts of the time, ascending; all of a video that has fewer frames.

    Where one frame stands for several parts, what is left goes into the widest gaps.

    Args:
        times: seconds at which the frames are shown, from 0 on, and the end of the last.
    """
    *shown, end = times
    if len(shown) <= frames:
        return list(range(len(shown)))
    moments = [(k + 0.5) * end / frames + 1e-6 for k in range(frames)]
    return fill({max(0, bisect_right(shown, moment) - 1) for moment in moments}, len(shown), frames)


def keyframe_indices(small: np.ndarray, frames: int) -> list[int]:
    """The first frame, and then again and again the one that differs most from all that are chosen, ascending.

    A difference is the mean square over small frames, so that much change in a small place counts, less what one frame
    usually differs from the next by: noise, and what moves all the time. Where no frame differs, what is left of `frames` goes
    into the widest gaps.
    """
    if len(small) <= frames:
        return list(range(len(small)))
    starts = range(0, len(small), BLOCK)
    steps = [difference(small[start : start + BLOCK], small[start + 1 : start + 1 + BLOCK]) for start in starts]
    usual = 1.25 * np.median(np.concatenate(steps)) + 1
    nearest = np.full(len(small), np.inf)
    chosen = {0}
    last = 0
    while len(chosen) < frames:
        now = [difference(small[start : start + BLOCK], small[last : last + 1]) for start in starts]
        nearest = np.minimum(nearest, np.concatenate(now))
        last = int(nearest.argmax())
        if nearest[last] <= usual:
            break
        chosen.add(last)
    return fill(chosen if len(chosen) > 1 else set(), len(small), frames)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean squared differences of rows (K, P) and (K or 1, P) -> (K,); of rows that are too many, the last are left out."""
    count = len(one) if len(other) == 1 else min(len(one), len(other))
    return np.square(one[:count].astype(np.float32) - other[:count]).mean(1)


def fill(chosen: set[int], count: int, frames: int) -> list[int]:
    """`chosen` and as many of the `count` frames more as make `frames`, each in the middle of the widest gap, ascending."""
    if not chosen:
        return [(2 * k + 1) * count // (2 * frames) for k in range(frames)]
    chosen = set(chosen)
    while len(chosen) < frames:
        borders = sorted({-1, *chosen, count})
        low, high = max(pairwise(borders), key=lambda gap: gap[1] - gap[0])
        chosen.add((low + high) // 2)
    return sorted(chosen)
