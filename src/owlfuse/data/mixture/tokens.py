"""Which source stands at each position, where the shares are of supervised tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import lcm
from typing import Any

import numpy as np

from owlfuse.data.mixture.schedule import Order, Rules, SampleSchedule
from owlfuse.data.mixture.shuffle import Shuffle
from owlfuse.data.mixture.windows import (
    Draws,
    Group,
    TokenSums,
    Windows,
    distances,
    groups_in,
    merging,
)

FRAME = 2**14
"""Positions that are computed at a time, about."""
KEPT = 4
"""Frames that are kept."""
LARGEST = 2**31
"""Tokens of a frame, at most."""
STEP = 2**30
"""Parts of a unit of time, in which a source gets as many tokens as its weight, 2^20 at most. What
comes first is decided in whole ones, so that machines agree: a source is at most 2^20 / 2^30 tokens
further from its share for each member of its groups. Twice LARGEST times half of STEP is below
2^63."""


class TokenSchedule(SampleSchedule):
    """Shares in supervised tokens: every prefix of a phase holds each source's tokens within
    `distance` of its share.

    Stretches are those of `SampleSchedule`; inside one, any position is found by a search, without
    those before it.
    """

    def __init__(self, rules: Rules, lengths: list[np.ndarray], shuffles: list[Shuffle]) -> None:
        self.sums = [
            TokenSums(counts, shuffle) for counts, shuffle in zip(lengths, shuffles, strict=True)
        ]
        super().__init__(rules)

    def order(self, shares: list[Fraction], drawn: np.ndarray) -> TokenOrder:
        """The order of a stretch in which all sources stand even at its start, where `drawn` of
        each were drawn before."""
        return TokenOrder(shares, self.sums, drawn.tolist())

    def distance(self, position: int) -> list[float]:
        """How many tokens each source can be from its share, at most, in prefixes of the stretch
        that holds a position."""
        order = self.stretch(position).order
        assert isinstance(order, TokenOrder)
        away = distances(order.group)
        return [float(away.get(source, 0)) for source in range(len(self.sums))]


@dataclass
class Part:
    """Samples of a stream that follow each other.

    Attributes:
        clock: tokens of the stream before the first.
        drawn: (S,) draws of each source before the first, counted from the stretch's start.
        sources: uint16 (K,) their sources.
        tokens: int64 (K,) their tokens.
    """

    clock: int
    drawn: np.ndarray
    sources: np.ndarray
    tokens: np.ndarray

    def cut(self, first: int, stop: int) -> Part:
        """The samples from one to before another."""
        drawn = self.drawn + np.bincount(self.sources[:first], minlength=len(self.drawn))
        clock = self.clock + int(self.tokens[:first].sum())
        return Part(clock, drawn, self.sources[first:stop], self.tokens[first:stop])

    def clocks(self, origin: int) -> np.ndarray:
        """int64 (K,) tokens before each sample, less `origin`."""
        return np.cumsum(self.tokens) - self.tokens + (self.clock - origin)


class TokenOrder(Order):
    """The order of a stretch without end: streams of samples are merged (`merging`), by when half
    of a sample's tokens are due, or each in its window of time.

    What stands where so many tokens came before depends on the samples near there alone, so that a
    frame of positions is found by itself, some 0.1 us a position of up to five sources, 0.9 of 40.
    A position's frame is searched for: positions grow with tokens.
    """

    def __init__(self, shares: list[Fraction], sums: list[TokenSums], first: list[int]) -> None:
        scale = lcm(*(share.denominator for share in shares))
        self.sums = sums
        self.shares = shares
        self.draws = [Draws(each, draw) for each, draw in zip(sums, first, strict=True)]
        self.group: Group = merging(
            tuple(int(share * scale) for share in shares), tuple(each.longest for each in sums)
        )
        longest = sum(each.longest for each, share in zip(sums, shares) if share)
        if 8 * longest > LARGEST:
            raise ValueError(
                f"the sources' longest samples have {longest:,} supervised tokens, expected "
                f"{LARGEST // 8:,} at most"
            )
        pace = float(
            sum(share * each.draws / each.tokens for share, each in zip(shares, sums) if share)
        )
        self.windows = {
            group: Windows(group, self.draws, pace)
            for group in groups_in(self.group)
            if group.in_windows
        }
        self.frame = max(min(int(FRAME / pace), LARGEST), 8 * longest)
        """Tokens of a frame."""
        self.pace = pace * self.frame
        """Positions of a frame, on average."""
        self.frames: dict[int, tuple[int, Part]] = {}

    def drawn(self, offset: int) -> np.ndarray:
        """How often each source stands before an offset."""
        start, part = self.frame_at(offset)
        return part.cut(offset - start, offset - start).drawn

    def due(self, source: int, draw: int) -> Fraction:
        """How many tokens there are in all when so many draws of a source are its share of them."""
        return self.draws[source].before(draw) / self.shares[source]

    def position_of(self, source: int, draw: int) -> int:
        """Where the source's k-th draw of the stretch stands, from 0."""
        sums = self.sums[source]
        pace = float(self.frame * self.shares[source] * sums.draws / sums.tokens)
        guess = int(self.due(source, draw)) // self.frame
        start, part = self.kept(search(partial(self.drawn_before, source), draw, guess, pace))
        return start + int(np.flatnonzero(part.sources == source)[draw - int(part.drawn[source])])

    def first_of(self, draws: dict[int, int]) -> int:
        """See `Order`.

        Only those are searched for that may be the first, by how far a source can be from its
        share.
        """
        away = distances(self.group)
        dues = {source: self.due(source, draw + 1) for source, draw in draws.items()}
        apart = {source: (away[source] + 1) / self.shares[source] for source in draws}
        latest = min(dues[source] + apart[source] for source in draws)
        return super().first_of(
            {i: draw for i, draw in draws.items() if dues[i] - apart[i] <= latest}
        )

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The sources' numbers from one offset to another, uint16."""
        parts = [np.empty(0, dtype=np.uint16)]
        while start < stop:
            first, part = self.frame_at(start)
            parts.append(part.sources[start - first : stop - first])
            start = first + len(part.sources)
        return np.concatenate(parts)

    def frame_at(self, offset: int) -> tuple[int, Part]:
        """The frame that holds an offset, and where it starts."""
        following = None
        for number, (start, part) in self.frames.items():
            if start <= offset < start + len(part.sources):
                return start, part
            if offset == start + len(part.sources):
                following = number + 1
        number = (
            search(self.due_before, offset, int(offset / self.pace), self.pace)
            if following is None
            else following
        )
        while True:  # it is near: this one or one beside it
            start, part = self.kept(number)
            if start <= offset < start + len(part.sources):
                return start, part
            number += 1 if offset >= start else -1

    def kept(self, number: int) -> tuple[int, Part]:
        """A frame and the offset of its first position, computed where it is not kept."""
        if number not in self.frames:
            while len(self.frames) >= KEPT:
                del self.frames[next(iter(self.frames))]
            part = self.part(self.group, number * self.frame, (number + 1) * self.frame)
            self.frames[number] = int(part.drawn.sum()), part
        return self.frames[number]

    def drawn_before(self, source: int, number: int) -> int:
        """How many draws of a source stand before a frame."""
        return int(self.part(self.group, number * self.frame, number * self.frame).drawn[source])

    def due_before(self, number: int) -> int:
        """How many draws are due before a frame."""
        tokens = number * self.frame
        return sum(
            draws.reach(int(share * tokens))
            for draws, share in zip(self.draws, self.shares, strict=True)
            if share
        )

    def part(self, group: Group, low: int, high: int) -> Part:
        """A group's samples that at least `low` of its tokens stand before, and fewer than `high`.

        A member's samples in a stretch of time are merged. At its ends the members are at most half
        of their longest samples from where the time says, so that a stretch that is longer by these
        holds all that is asked for. Whole numbers of 64 bits, counted from near by, hold what is
        added up; what it is counted from has as many digits as it takes.
        """
        if not group.members:
            return self.source_part(group.source, low, high)
        if group.in_windows:
            return self.windows_part(group, low, high)
        margin = sum(member.longest for member in group.members) // 2 + 1
        origin = (low - margin) // group.weight
        first = STEP * (low - margin - origin * group.weight) // group.weight
        last = -(-STEP * (high + margin - origin * group.weight) // group.weight)
        parts, times = [], []
        for member in group.members:
            at, half = origin * member.weight, member.longest // 2 + 1
            part = self.part(
                member,
                at + first * member.weight // STEP - half,
                at + last * member.weight // STEP + 1,
            )
            due = (2 * part.clocks(at) + part.tokens) * (STEP // 2) // member.weight
            start, stop = due.searchsorted([first, last])
            parts.append(part.cut(start, stop))
            times.append(due[start:stop])
        order = np.concatenate(times).argsort(kind="stable")
        clock = sum(part.clock for part in parts)
        drawn: Any = sum(part.drawn for part in parts)
        sources, tokens = (
            np.concatenate(each)[order]
            for each in zip(*((part.sources, part.tokens) for part in parts))
        )
        whole = Part(clock, drawn, sources, tokens)
        return whole.cut(*whole.clocks(low).searchsorted([0, high - low]))

    def windows_part(self, group: Group, low: int, high: int) -> Part:
        """Of a group whose samples stand in windows."""
        before, sources, tokens = self.windows[group].between(low, high)
        drawn = np.zeros(len(self.sums), dtype=np.int64)
        drawn[[member.source for member in group.members]] = before.drawn
        whole = Part(before.tokens, drawn, sources, tokens)
        return whole.cut(*whole.clocks(low).searchsorted([0, high - low]))

    def source_part(self, source: int, low: int, high: int) -> Part:
        """Of a source."""
        draws = self.draws[source]
        start, stop = draws.reach(low), draws.reach(high)
        drawn = np.zeros(len(self.sums), dtype=np.int64)
        drawn[source] = start
        tokens = draws.between(start, stop)
        return Part(
            draws.before(start), drawn, np.full(len(tokens), source, dtype=np.uint16), tokens
        )


def search(before: Callable[[int], int], draw: int, guess: int, pace: float) -> int:
    """The frame that holds the k-th draw, from a guess on by how many are missing, later by halves.

    Args:
        before: draws before a frame.
        pace: draws of a frame, on average.
    """
    low, found_low, high, step = 0, 0, None, guess
    for tried in range(1, 200):
        number = low + max(1, step) if high is None else min(low + max(1, step), high - 1)
        found = before(number)
        low, found_low, high = (number, found, high) if found <= draw else (low, found_low, number)
        if high == low + 1:
            return low
        halves = 2**tried if high is None else (high - low) // 2
        step = int((draw - found_low) / pace) if tried < 8 else halves
    raise AssertionError(f"draw {draw} is in no frame")
