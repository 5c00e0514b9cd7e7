"""Samples of questions that stand for all of them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

SEED = 0
"""Of every sample: runs of other seeds are asked the same questions, so that they can be
compared."""


def stratified_sample(kinds: Sequence[str], pictures: Sequence[Hashable], limit: int) -> list[int]:
    """The indices, in order, of at most `limit` items, drawn by a fixed seed: of each kind as many
    as its share of all (by largest remainders), and within it from the pictures that were drawn
    least until then.

    Args:
        kinds: of each item.
        pictures: what of each item is not to be drawn again and again.
    """
    if limit >= len(kinds):
        return list(range(len(kinds)))
    chance = random.Random(SEED)
    members: dict[str, list[int]] = defaultdict(list)
    for index in chance.sample(range(len(kinds)), len(kinds)):
        members[kinds[index]].append(index)
    drawn: Counter[Hashable] = Counter()
    chosen: list[int] = []
    for kind, count in quotas(
        {kind: len(indices) for kind, indices in members.items()}, limit
    ).items():
        left, times = members[kind], 0
        while count:
            later = []
            for index in left:
                if count and drawn[pictures[index]] <= times:
                    drawn[pictures[index]] += 1
                    chosen.append(index)
                    count -= 1
                else:
                    later.append(index)
            left, times = later, times + 1
    return sorted(chosen)


def quotas(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """`limit` shared out in proportion to the sizes, at least one to each where it is enough for
    all."""
    total = sum(sizes.values())
    least = 1 if limit >= len(sizes) else 0
    counts = {kind: max(least, size * limit // total) for kind, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda kind: counts[kind] - sizes[kind] * limit / total)
    for kind in by_remainder[: max(0, limit - sum(counts.values()))]:
        counts[kind] += 1
    for _ in range(sum(counts.values()) - limit):  # of what was given to small kinds
        largest = max(counts, key=lambda kind: counts[kind])
        counts[largest] -= 1
    return counts
