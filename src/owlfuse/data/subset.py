"""Stratified samples of questions."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

# The seed of every sample: runs of other seeds answer the same questions, so that they can be
# compared.
SEED = 0


def stratified_sample(kinds: Sequence[str], pictures: Sequence[Hashable], limit: int) -> list[int]:
    """Return the indices, in order, of at most `limit` items, drawn by a fixed seed: of each kind
    as many as its share of all (by largest remainders), and within it from the pictures that were
    drawn least until then.

    Args:
        kinds: of each item.
        pictures: of each item, its picture, or another group that is to be drawn from evenly.
    """
    if limit >= len(kinds):
        return list(range(len(kinds)))
    rng = random.Random(SEED)
    members: dict[str, list[int]] = defaultdict(list)
    # random order within each kind, from one generator
    for index in rng.sample(range(len(kinds)), len(kinds)):
        members[kinds[index]].append(index)
    sizes = {kind: len(indices) for kind, indices in members.items()}
    draws: Counter[Hashable] = Counter()
    chosen: list[int] = []
    for kind, count in quotas(sizes, limit).items():
        candidates, times = members[kind], 0
        while count:
            later = []
            for index in candidates:
                if count and draws[pictures[index]] <= times:
                    draws[pictures[index]] += 1
                    chosen.append(index)
                    count -= 1
                else:
                    later.append(index)
            candidates, times = later, times + 1
    return sorted(chosen)


def quotas(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Return `limit` divided in proportion to the sizes, at least one to each where it is enough
    for all."""
    total = sum(sizes.values())
    least = 1 if limit >= len(sizes) else 0
    counts = {kind: max(least, size * limit // total) for kind, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda kind: counts[kind] - sizes[kind] * limit / total)
    for kind in by_remainder[: max(0, limit - sum(counts.values()))]:
        counts[kind] += 1
    # The ones that small kinds got beyond their share come from the largest.
    for _ in range(sum(counts.values()) - limit):
        largest = max(counts, key=lambda kind: counts[kind])
        counts[largest] -= 1
    return counts
