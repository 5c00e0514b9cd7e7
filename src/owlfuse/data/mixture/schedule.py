"""The source at each position of a mixture: phases of constant weights, in each of which every
prefix is exact."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

# Positions of the longest period. Shares that need a longer one are rounded.
MAX_PERIOD = 2**20
# A shorter period is repeated up to this length, so that long ranges are copied in long pieces.
MIN_PERIOD = 2**12
AT_END = ("repeat", "stop", "once")


@dataclass
class Stretch:
    """Positions of constant shares, from `start` to before `stop` (None: without end).

    `counts` holds how many samples of each source stand before `start`.
    """

    start: int
    stop: int | None
    counts: np.ndarray
    order: PeriodicOrder


class Schedule:
    """Assigns a source to every position, without state.

    A stretch is a phase, or its part up to the position where a source drops out. Stretches are
    computed when a position in or behind them is first asked for. An order takes 6 bytes a position
    of its period, 6 MB at most. Memory is therefore bounded by phases and sources, not by
    positions.

    Args:
        phases: the first position of each phase and the share of each source in it.
        sizes: samples of each source.
        at_end: what happens when a source is used up, one of `AT_END` for each source.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Sequence[Fraction]]],
        sizes: Sequence[int],
        at_end: Sequence[str],
    ) -> None:
        self.phases = phases
        self.sizes = sizes
        self.at_end = at_end
        self.stretches: list[Stretch] = []
        self.length: int | None = None
        """Positions of the whole schedule, once its end has been reached."""
        self.add_stretch(0, np.zeros(len(sizes), dtype=np.int64))

    def available(self, positions: int) -> int:
        """Return `positions`, or how many there are where the schedule ends before."""
        self.extend_to(positions)
        return positions if self.length is None else min(positions, self.length)

    def counts_before(self, position: int) -> np.ndarray:
        """Return how many samples of each source stand before a position, int64 (sources,)."""
        stretch = self.stretch_at(position)
        return stretch.counts + stretch.order.counts_before(position - stretch.start)

    def sources(self, start: int, stop: int) -> np.ndarray:
        """Return the sources' numbers from `start` to before `stop`, uint16 (stop - start,)."""
        parts = [np.empty(0, dtype=np.uint16)]
        while start < stop:
            stretch = self.stretch_at(start)
            last = stop if stretch.stop is None else min(stop, stretch.stop)
            first_offset, last_offset = start - stretch.start, last - stretch.start
            parts.append(stretch.order.sources(first_offset, last_offset))
            start = last
        return np.concatenate(parts)

    def stretch_at(self, position: int) -> Stretch:
        """Return the stretch that holds a position."""
        self.extend_to(position)
        starts = [stretch.start for stretch in self.stretches]
        return self.stretches[bisect_right(starts, position) - 1]

    def extend_to(self, position: int) -> None:
        """Compute the stretches up to the one that holds a position."""
        while self.length is None:
            last = self.stretches[-1]
            if last.stop is None or last.stop > position:
                return
            counts = last.counts + last.order.counts_before(last.stop - last.start)
            self.add_stretch(last.stop, counts)

    def add_stretch(self, start: int, counts: np.ndarray) -> None:
        """Add the stretch from `start` on, or set `length` where the schedule ends there."""
        shares = self.shares_at(start, counts)
        if not shares:
            self.length = start
            return
        order = order_of(tuple(shares))
        ends = [first for first, _ in self.phases if first > start]
        for source, size in enumerate(self.sizes):
            if self.at_end[source] != "repeat" and shares[source]:
                last_draw = size - int(counts[source]) - 1
                ends.append(start + order.position_of(source, last_draw) + 1)
        stop = min(ends, default=None)
        self.stretches.append(Stretch(start, stop, counts, order))

    def shares_at(self, position: int, counts: np.ndarray) -> list[Fraction]:
        """Return the shares from a position on, 0 for a source that has dropped out.

        The list is empty where the schedule ends: no source is left, or one with `stop` is used up.
        """
        phase = bisect_right([start for start, _ in self.phases], position) - 1
        shares = list(self.phases[phase][1])
        for source, size in enumerate(self.sizes):
            if self.at_end[source] == "repeat" or counts[source] < size:
                continue
            if self.at_end[source] == "stop":
                return []
            shares[source] = Fraction(0)
        return exact_shares(shares) if any(shares) else []


class PeriodicOrder:
    """An order of sources whose period holds each of them in exactly its share."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        shortest = math.lcm(*(share.denominator for share in shares))
        repeats = math.ceil(MIN_PERIOD / shortest)
        self.period = shortest * repeats
        self.order = np.tile(chairman_order(shares, shortest), repeats)
        self.positions = []
        for source in range(len(shares)):
            positions = np.flatnonzero(self.order == source)
            self.positions.append(positions.astype(np.int32))
        self.counts = np.array([len(positions) for positions in self.positions])

    def counts_before(self, offset: int) -> np.ndarray:
        """Return how often each source stands before an offset."""
        periods, offset = divmod(offset, self.period)
        # A number of another type would make searchsorted convert the whole array.
        within = np.int32(offset)
        counts = [positions.searchsorted(within) for positions in self.positions]
        return periods * self.counts + np.array(counts)

    def position_of(self, source: int, draw: int) -> int:
        """Return where a source's draw stands, both counted from 0."""
        periods, index = divmod(draw, int(self.counts[source]))
        return periods * self.period + int(self.positions[source][index])

    def sources(self, start: int, stop: int) -> np.ndarray:
        """Return the sources' numbers from `start` to before `stop`, uint16."""
        first = start % self.period
        last = first + stop - start
        if last <= self.period:
            return self.order[first:last]
        periods = math.ceil(last / self.period)
        return np.tile(self.order, periods)[first:last]


# The order of some shares, the same object for phases and mixtures of equal shares.
order_of = lru_cache(maxsize=32)(PeriodicOrder)


def exact_shares(weights: Iterable[float | Fraction | int]) -> list[Fraction]:
    """Return weights as fractions that add up to 1, of a common denominator up to MAX_PERIOD.

    A number is taken as the decimal fraction that it is written as. Where the denominator would be
    larger, shares are rounded to multiples of 1 / MAX_PERIOD, of which no weight gets fewer than
    one.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= MAX_PERIOD:
        return shares
    counts = []
    for share in shares:
        least = 1 if share else 0
        counts.append(max(least, int(share * MAX_PERIOD)))
    missing = MAX_PERIOD - sum(counts)
    # Those that rounding down has cut most come first: each is then within one of its exact count.
    rounding = [count - share * MAX_PERIOD for count, share in zip(counts, shares, strict=True)]
    by_cut = sorted(range(len(shares)), key=rounding.__getitem__)
    for source in by_cut[: max(missing, 0)]:
        counts[source] += 1
    # Where many were raised to 1, too many are handed out: the largest share gives them back.
    counts[counts.index(max(counts))] += min(missing, 0)
    return [Fraction(count, MAX_PERIOD) for count in counts]


def shares_by_name(weights: Mapping[str, float | Fraction]) -> dict[str, Fraction]:
    """Return `exact_shares` of named weights."""
    return dict(zip(weights, exact_shares(weights.values()), strict=True))


def chairman_order(shares: Sequence[Fraction], period: int) -> np.ndarray:
    """Return which source stands at each position of a period, uint16 (period,).

    Of the sources that have fallen behind enough, the one that must come soonest is next (Tijdeman,
    The chairman assignment problem, 1980). A source is within 1 - 1 / (2n - 2) samples of its share
    everywhere, n the number of sources.

    The k-th draw of a source with c draws in a period of P may come once c * t / P exceeds k by
    1 / (2n - 2), and must have come before it exceeds k by 2 - 2 / (2n - 2).
    """
    # exact, since the period is a multiple of every denominator
    counts = np.array([int(share * period) for share in shares], dtype=np.int64)
    active = int((counts > 0).sum())
    # The slack of one source would be 0, and times are divided by it.
    if active == 1:
        return np.full(period, counts.argmax(), dtype=np.uint16)
    slack = 2 * active - 2
    # in whole numbers, since a float would round the times within a long period
    source = np.repeat(np.arange(len(counts)), counts)
    draw = np.concatenate([np.arange(count) for count in counts])
    pace = counts[source] * slack
    # -(-a // b) rounds up
    release = -((-(1 + draw * slack) * period) // pace)
    deadline = (slack - 1 + draw * slack) * period // pace
    by_release = np.lexsort((deadline, release))
    releases = release[by_release].tolist()
    deadlines = deadline[by_release].tolist()
    draws = list(zip(deadlines, source[by_release].tolist(), strict=True))
    order = np.empty(period, dtype=np.uint16)
    ready: list[tuple[int, int]] = []
    added = 0
    for position in range(period):
        while added < period and releases[added] <= position + 1:
            heapq.heappush(ready, draws[added])
            added += 1
        order[position] = heapq.heappop(ready)[1]
    return order
