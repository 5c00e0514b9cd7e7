"""The exact schedule in which samples are drawn: a pure function of (seed, position)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np

MAX_PERIOD = 2**20


class Mixture:
    """Says for every position which sample of which source stands there, without state.

    The sources' order repeats with a period in which each source has exactly its weight's share, and is laid out so that
    every prefix holds each source within one sample of its weight (Tijdeman, The chairman assignment problem, 1980). Each
    pass over a source is a new shuffle, which covers every sample once.

    Args:
        sizes: samples of each source.
        weights: relative shares. They are taken as the decimal fractions they are written as; where the period would be
            longer than 2^20, as multiples of 2^-20.

    Raises:
        ValueError: a weight that is negative or no number, all weights zero, or a source with a weight and no sample.
    """

    def __init__(self, sizes: dict[str, int], weights: dict[str, float], seed: int = 0) -> None:
        check_weights(sizes, weights)
        self.names = [name for name in sizes if weights[name] > 0]
        self.sizes = sizes
        self.seed = seed
        self.shares = exact_shares([weights[name] for name in self.names])
        self.period = math.lcm(*(share.denominator for share in self.shares))
        self.order = chairman_order(self.shares, self.period)
        drawn = np.stack([self.order == source for source in range(len(self.names))])
        self.before = np.concatenate([np.zeros((len(self.names), 1), dtype=np.int64), drawn.cumsum(1)], axis=1)

    def __getitem__(self, position: int) -> tuple[str, int]:
        """The source's name and the sample's index in it, at a position from 0."""
        rounds, offset = divmod(position, self.period)
        source = int(self.order[offset])
        draw = rounds * int(self.before[source, -1]) + int(self.before[source, offset])
        name = self.names[source]
        epoch, place = divmod(draw, self.sizes[name])
        return name, int(shuffled(self.sizes[name], self.seed, source, epoch)[place])

    def counts(self, positions: int) -> dict[str, int]:
        """How many of the first `positions` samples each source gives."""
        rounds, offset = divmod(positions, self.period)
        return {name: int(rounds * self.before[i, -1] + self.before[i, offset]) for i, name in enumerate(self.names)}


def check_weights(sizes: dict[str, int], weights: dict[str, float]) -> None:
    """Raises ValueError for weights that make no mixture, naming the source."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"source {name} has weight {weight}, expected a number of at least 0")
        if weight > 0 and sizes[name] == 0:
            raise ValueError(f"source {name} has weight {weight} and no sample")
    if not any(weights.values()):
        raise ValueError(f"the weights of all sources ({', '.join(weights) or 'none'}) are 0")


def exact_shares(weights: list[float]) -> list[Fraction]:
    """Weights as fractions that add up to 1, with a common denominator of at most MAX_PERIOD."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= MAX_PERIOD:
        return shares
    rounded = [max(1, round(share * MAX_PERIOD)) for share in shares]
    rounded[rounded.index(max(rounded))] += MAX_PERIOD - sum(rounded)
    return [Fraction(count, MAX_PERIOD) for count in rounded]


def chairman_order(shares: list[Fraction], period: int) -> np.ndarray:
    """Which source stands at each position of a period: of the sources that have fallen behind enough, the one that must
    come soonest. Tijdeman's rule, in whole numbers."""
    n = len(shares)
    if n == 1:
        return np.zeros(period, dtype=np.int64)
    counts = [int(share * period) for share in shares]
    slack = 2 * n - 2  # a source is within 1 - 1 / (2n - 2) of its share
    drawn = [0] * n
    order = np.empty(period, dtype=np.int64)
    for position in range(1, period + 1):
        # behind_i = share_i * position - drawn_i, times period * slack
        best, due = -1, None
        for i, count in enumerate(counts):
            behind = (count * position - drawn[i] * period) * slack
            if behind >= period:
                deadline = ((slack - 1) * period - behind) / count
                if due is None or deadline < due:
                    best, due = i, deadline
        order[position - 1] = best
        drawn[best] += 1
    return order


@lru_cache(maxsize=16)
def shuffled(size: int, seed: int, source: int, epoch: int) -> np.ndarray:
    """The order of a source's samples in one pass over it."""
    return np.random.Generator(np.random.PCG64([seed, source, epoch])).permutation(size)
