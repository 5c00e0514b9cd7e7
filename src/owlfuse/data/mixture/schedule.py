"""Which source stands at each position: phases of constant weights, in each of which every
prefix is exact."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

MAX_PERIOD = 2**20
LEAST_PERIOD = 2**12
ENDS = ("repeat", "stop", "once")


@dataclass(frozen=True)
class Rules:
    """What a schedule is made of: `weights` of each phase (first position, weight of each source),
    and by source its `sizes` in samples and what happens when it is used up (`ends`: repeat, stop
    or once)."""

    phases: list[tuple[int, list[Fraction]]]
    sizes: list[int]
    ends: list[str]

    def shares(self, position: int, drawn: np.ndarray) -> list[Fraction]:
        """Shares from `position` on, 0 for a source that is used up and drops out. Empty where none
        is left, or where a source is used up that stops the schedule."""
        if self.stopped(drawn) is not None:
            return []
        phase = bisect_right([start for start, _ in self.phases], position) - 1
        left = [
            Fraction(0) if self.used_up(i, drawn) else weight
            for i, weight in enumerate(self.phases[phase][1])
        ]
        return exact_shares(left) if any(left) else []

    def stopped(self, drawn: np.ndarray) -> int | None:
        """The source that has ended the schedule."""
        found = (
            i for i, end in enumerate(self.ends) if end == "stop" and drawn[i] >= self.sizes[i]
        )
        return next(found, None)

    def used_up(self, source: int, drawn: np.ndarray) -> bool:
        """Whether a source has dropped out."""
        return self.ends[source] == "once" and bool(drawn[source] >= self.sizes[source])

    def phase_end(self, position: int) -> int | None:
        """Where the phase that holds `position` ends."""
        return next((start for start, _ in self.phases if start > position), None)


@dataclass
class Stretch:
    """Positions from `start` to before `stop` (None: without end) that have one order; `drawn`
    of each source before."""

    start: int
    stop: int | None
    drawn: np.ndarray
    order: Order


class SampleSchedule:
    """Shares in samples. Stretches are found when a position in them, or after them, is first asked
    for.

    An order takes 6 bytes a position of its period, 6 MB at most; a stretch is a phase, or its part
    up to where a source drops out, so that memory is bounded by phases and sources, not by
    positions.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.stretches: list[Stretch] = []
        self.length: int | None = None
        self.extend(0, np.zeros(len(rules.sizes), dtype=np.int64))

    def extend(self, position: int, drawn: np.ndarray) -> None:
        """Adds the stretch from `position` on, or notes that the schedule ends there."""
        shares = self.rules.shares(position, drawn)
        if not shares:
            self.length = position
            return
        order = self.order(shares, drawn)
        lasts = {  # of each source that is ever used up, its last draw, counted from here
            i: size - int(drawn[i]) - 1
            for i, size in enumerate(self.rules.sizes)
            if self.rules.ends[i] != "repeat" and shares[i]
        }
        ends = [
            self.rules.phase_end(position),
            position + order.first_of(lasts) + 1 if lasts else None,
        ]
        stop = min((end for end in ends if end is not None), default=None)
        self.stretches.append(Stretch(position, stop, drawn, order))

    def order(self, shares: list[Fraction], drawn: np.ndarray) -> Order:
        """The order of a stretch in which all sources stand even at its start, where `drawn` of
        each were drawn before."""
        return order_of(tuple(shares))

    def reach(self, position: int) -> None:
        """Finds the stretches up to the one that holds `position`."""
        while (
            self.length is None
            and (last := self.stretches[-1]).stop is not None
            and last.stop <= position
        ):
            self.extend(last.stop, last.drawn + last.order.drawn(last.stop - last.start))

    def available(self, positions: int) -> int:
        """`positions`, or how many there are where the schedule ends before."""
        self.reach(positions)
        return positions if self.length is None else min(positions, self.length)

    def stretch(self, position: int) -> Stretch:
        """The stretch that holds a position."""
        self.reach(position)
        return self.stretches[bisect_right([s.start for s in self.stretches], position) - 1]

    def drawn(self, position: int) -> np.ndarray:
        """(S,) how many of the first `position` samples each source gives."""
        stretch = self.stretch(position)
        return stretch.drawn + stretch.order.drawn(position - stretch.start)

    def sources(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) the sources' numbers."""
        parts = []
        while start < stop:
            stretch = self.stretch(start)
            last = stop if stretch.stop is None else min(stop, stretch.stop)
            parts.append(stretch.order.sources(start - stretch.start, last - stretch.start))
            start = last
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


class Order:
    """The order of a period in which each source has exactly its share, and its repetition."""

    def __init__(self, shares: tuple[Fraction, ...]) -> None:
        exact = math.lcm(*(share.denominator for share in shares))
        # written out several times, so that long stretches are copied in long pieces
        times = -(-LEAST_PERIOD // exact)
        self.period = exact * times
        self.order = np.tile(chairman_order(list(shares), exact), times)
        self.places = [np.flatnonzero(self.order == i).astype(np.int32) for i in range(len(shares))]
        self.counts = np.array([len(places) for places in self.places])

    def drawn(self, offset: int) -> np.ndarray:
        """How often each source stands before an offset."""
        rounds, offset = divmod(offset, self.period)
        within = np.int32(offset)  # of the places' own kind, or all of them would be converted
        return rounds * self.counts + np.array(
            [places.searchsorted(within) for places in self.places]
        )

    def position_of(self, source: int, draw: int) -> int:
        """Where the source's k-th draw stands, from 0."""
        rounds, place = divmod(draw, int(self.counts[source]))
        return rounds * self.period + int(self.places[source][place])

    def first_of(self, draws: dict[int, int]) -> int:
        """Where the first of some draws stands, one of each source that is named."""
        return min(self.position_of(source, draw) for source, draw in draws.items())

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The sources' numbers from one offset to another, uint16."""
        first = start % self.period
        if first + stop - start <= self.period:
            return self.order[first : first + stop - start]
        whole = np.empty(
            (-(-(first + stop - start) // self.period), self.period), dtype=self.order.dtype
        )
        whole[:] = self.order
        return whole.reshape(-1)[first : first + stop - start]


@lru_cache(maxsize=32)
def order_of(shares: tuple[Fraction, ...]) -> Order:
    """The order of these shares; phases and mixtures of the same shares have one."""
    return Order(shares)


def exact_shares(weights: Sequence[float | Fraction | int]) -> list[Fraction]:
    """Weights as fractions that add up to 1, with a common denominator of at most MAX_PERIOD."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= MAX_PERIOD:
        return shares
    rounded = [max(1, int(share * MAX_PERIOD)) if share else 0 for share in shares]
    left = MAX_PERIOD - sum(rounded)
    most_cut = sorted(range(len(shares)), key=lambda i: rounded[i] - shares[i] * MAX_PERIOD)
    for i in most_cut[: max(left, 0)]:  # so that each is within one of what it should be
        rounded[i] += 1
    rounded[rounded.index(max(rounded))] += min(left, 0)  # where many were raised to 1
    return [Fraction(count, MAX_PERIOD) for count in rounded]


def chairman_order(shares: list[Fraction], period: int) -> np.ndarray:
    """Which source stands at each position of a period: of those that have fallen behind enough,
    the one that must come soonest (Tijdeman, The chairman assignment problem, 1980). A source is
    within 1 - 1 / (2n - 2) of its share everywhere.

    The k-th draw of a source with c draws in a period of P may come once c * t / P exceeds k by 1 /
    (2n - 2), and must have come before it exceeds k by 2 - 2 / (2n - 2).
    """
    counts = np.array([int(share * period) for share in shares], dtype=np.int64)
    if (counts > 0).sum() == 1:
        return np.full(period, counts.argmax(), dtype=np.uint16)
    slack = 2 * int((counts > 0).sum()) - 2
    source = np.repeat(np.arange(len(counts)), counts)
    draw = np.concatenate([np.arange(count) for count in counts])
    release = -((-(1 + draw * slack) * period) // (counts[source] * slack))
    deadline = (slack - 1 + draw * slack) * period // (counts[source] * slack)
    jobs = np.lexsort((deadline, release))
    release, waiting = (
        release[jobs].tolist(),
        list(zip(deadline[jobs].tolist(), source[jobs].tolist())),
    )
    order = np.empty(period, dtype=np.uint16)
    ready: list[tuple[int, int]] = []
    job = 0
    for position in range(1, period + 1):
        while job < period and release[job] <= position:
            heapq.heappush(ready, waiting[job])
            job += 1
        order[position - 1] = heapq.heappop(ready)[1]
    return order
