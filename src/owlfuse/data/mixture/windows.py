"""The stream of several sources in which each sample stands in its window of time, however many
sources there are."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from owlfuse.data.mixture.shuffle import Shuffle

FRAME = 2**14
"""Positions of a frame, about, where no sample is longer under way."""
KEPT = 4
"""Frames that are kept."""
STEP = 2**8
"""Parts of a token in which times are compared, where whole numbers of 64 bits hold them."""


@dataclass(frozen=True)
class Cut:
    """What stands before a frame: `tokens` of all, `drawn` by each member."""

    tokens: int
    drawn: list[int]


@dataclass
class Open:
    """A sample that has begun before a time and ends after it, were all sources served at once,
    each by its share.

    Attributes:
        place: whose sample it is, among the members.
        given: of its length, what it is given before the time; in parts of a token, so that all
            numbers are whole.
        length: in such parts.
        begins, ends: tokens of all sources by which it would begin and end.
    """

    place: int
    given: int
    length: int
    begins: Fraction
    ends: Fraction


class Windows:
    """Samples in the order of when they must end, as soon as they may begin (WF2Q: Bennett and
    Zhang, Worst-case fair weighted fair queueing, 1996), in frames that are found one without
    another.

    Were all sources served at once, a sample would be served from S, what stands before it in its
    source / the source's share, to F. Here it begins at S - L / 2 at the earliest and ends at F + L
    / 2 at the latest, L the longest sample of any source: a source with longest sample l and share
    p is never further than l (1 - p) + p L / 2 from its share.

    Frames: at each multiple of `frame` tokens a cut says which of the samples that are under way
    there stand before it. The rest follows if (1) the cut puts at most L / 2 too much before it of
    any samples that end after some time, and (2) at most L / 2 too little of any that begin before
    some time. For then (2) what is left of a frame at any time cannot all begin L / 2 later or
    more, so that a sample may always begin; and (1) what must end by some time and stands behind
    the cut takes at most L / 2 longer than there is time.

    A cut moves what samples have been given there to those that both begin and end earlier, which
    makes (1) and (2) better, as long as there is a pair. Those then given a part only lie in each
    other, the first to begin the last to end, so that one order serves both: each is put before or
    behind the cut, so that sums of what this adds stay within L / 2.

    Args:
        group: its members are sources.
        draws: of every source of the mixture.
        pace: positions a token, about.
    """

    def __init__(self, group: Group, draws: list[Draws], pace: float) -> None:
        self.members = group.members
        self.weight = group.weight
        self.longest = group.longest
        self.draws = [draws[member.source] for member in group.members]
        under_way = max(
            -(-member.longest * group.weight // member.weight) for member in group.members
        )
        self.frame = max(int(FRAME / pace), under_way)
        """Tokens of a frame: no sample is under way at two cuts."""
        most = (
            max(member.weight for member in group.members) * self.frame
            + group.weight * 2 * group.longest
        )
        self.step = max(1, min(STEP, 2**62 // most))
        self.cuts: dict[int, Cut] = {}
        self.frames: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without frames: a worker makes its own."""
        return self.__dict__ | {"frames": {}, "cuts": {}}

    def between(self, low: int, high: int) -> tuple[Cut, np.ndarray, np.ndarray]:
        """Frames that hold the samples that at least `low` tokens of the stream stand before, and
        fewer than `high`.

        Returns:
            What stands before the first sample; the samples' sources, uint16 (K,); their tokens,
                int64 (K,).
        """
        number = max(0, low // self.frame)
        # samples without tokens may end the frame before
        if number and self.cut(number).tokens >= low:
            number -= 1
        first = self.cut(number)
        sources, tokens = [np.empty(0, dtype=np.uint16)], [np.empty(0, dtype=np.int64)]
        while self.cut(number).tokens < high:
            samples = self.samples(number)
            sources.append(samples[0])
            tokens.append(samples[1])
            number += 1
        return first, np.concatenate(sources), np.concatenate(tokens)

    def cut(self, number: int) -> Cut:
        """What stands before a frame."""
        if number not in self.cuts:
            if len(self.cuts) > 2 * KEPT:
                del self.cuts[next(iter(self.cuts))]
            self.cuts[number] = self.made_cut(number * self.frame)
        return self.cuts[number]

    def made_cut(self, time: int) -> Cut:
        """Of each source the samples that would have ended, and of those under way the ones that
        stand before the cut."""
        if not time:  # samples without tokens would have ended
            return Cut(0, [0] * len(self.members))
        drawn, under_way = [], []
        for place, (member, draws) in enumerate(zip(self.members, self.draws, strict=True)):
            share = member.weight * time
            draw = draws.reach(share // self.weight + 1) - 1
            begins, ends = draws.before(draw) * self.weight, draws.before(draw + 1) * self.weight
            if begins < share:
                edges = Fraction(begins, member.weight), Fraction(ends, member.weight)
                under_way.append(Open(place, share - begins, ends - begins, *edges))
            drawn.append(draw)
        for place in before_cut(under_way, self.longest * self.weight // 2):
            drawn[place] += 1
        return Cut(sum(draws.before(draw) for draws, draw in zip(self.draws, drawn)), drawn)

    def samples(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources, uint16 (K,), and tokens, int64 (K,), of a frame's samples."""
        if number not in self.frames:
            if len(self.frames) >= KEPT:
                del self.frames[next(iter(self.frames))]
            self.frames[number] = self.made_samples(number)
        return self.frames[number]

    def made_samples(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples between two cuts, in order.

        Times are counted from the first cut's, in parts of a token.
        """
        origin, first, last = number * self.frame, self.cut(number), self.cut(number + 1)
        sources, tokens, begins, ends = [], [], [], []
        for member, draws, start, stop in zip(
            self.members, self.draws, first.drawn, last.drawn, strict=True
        ):
            near, rest = divmod(member.weight * origin, self.weight)
            lengths = draws.between(start, stop)
            after = np.cumsum(lengths) + (draws.before(start) - near)
            edges = [
                (self.weight * edge - rest) * self.step // member.weight
                for edge in (after - lengths, after)
            ]
            sources.append(np.full(len(lengths), member.source, dtype=np.uint16))
            tokens.append(lengths)
            begins.append(edges[0] - self.longest * self.step // 2)
            ends.append(edges[1])
        lengths = np.concatenate(tokens)
        time = (first.tokens - origin) * self.step
        order = in_time(np.concatenate(begins), np.concatenate(ends), lengths * self.step, time)
        return np.concatenate(sources)[order], lengths[order]


def before_cut(under_way: list[Open], half: int) -> list[int]:
    """Places of the members whose sample under way stands before a cut (`Windows`).

    Args:
        half: of the longest sample, in the parts in which the samples are measured.
    """
    before: list[int] = []
    parted: list[Open] = []
    for sample in sorted(under_way, key=lambda sample: (sample.begins, sample.ends, sample.place)):
        while sample.given and parted and parted[-1].ends <= sample.ends:
            moved = min(sample.given, parted[-1].length - parted[-1].given)
            sample.given -= moved
            parted[-1].given += moved
            if parted[-1].given == parted[-1].length:
                before.append(parted.pop().place)
        if sample.given:
            parted.append(sample)
    assert all(outer.ends > inner.ends for outer, inner in pairwise(parted))
    added = 0
    for sample in parted:
        added -= sample.given
        if added + sample.length <= half:
            added += sample.length
            before.append(sample.place)
    return before


def in_time(begins: np.ndarray, ends: np.ndarray, lengths: np.ndarray, time: int) -> np.ndarray:
    """Jobs one after another from a time on, each time the one that must end first of those that
    may begin.

    Args:
        begins, ends, lengths: int64 (K,).

    Returns:
        The jobs' numbers in order, int64 (K,).
    """
    ranks = np.empty(len(ends), dtype=np.int64)
    by_end = ends.argsort(kind="stable")
    ranks[by_end] = np.arange(len(ends))
    by_begin = begins.argsort(kind="stable")
    waiting, begin, length = (
        ranks[by_begin].tolist(),
        begins[by_begin].tolist(),
        lengths[by_end].tolist(),
    )
    begin.append(2**63)
    ready: list[int] = []
    order: list[int] = []
    job = 0
    for _ in waiting:
        while begin[job] <= time or not ready:
            heapq.heappush(ready, waiting[job])
            job += 1
        order.append(heapq.heappop(ready))
        time += length[order[-1]]
    return by_end[order]


FEW = 5
"""Sources of which all ways to merge them are tried."""
WIDE = 2**10
"""Longest samples in the time that a sample of a source takes to be due, where it shares windows
with others."""


@dataclass(frozen=True)
class Group:
    """A source, or groups whose samples are merged into one stream.

    Attributes:
        weight: of all its sources.
        longest: tokens of the longest sample.
        members: none of a source.
        in_windows: whether its members' samples stand in windows of time (`windows`), not where
            half of each is due.
        source: its number, -1 of several.
        slack: tokens for each unit of weight that what its sources still may be away from their
            shares by.
    """

    weight: int
    longest: int
    members: tuple[Group, ...]
    source: int
    slack: float
    in_windows: bool = False


def merged(members: tuple[Group, ...]) -> Group:
    """One group of several.

    Samples come in the order of (tokens before it in its member + half its own) / the member's
    weight. At every point of that order a member is at most half of its longest sample from weight
    times a common time. Its tokens are then at most L / 2 + p * (sum of all members' L / 2 - L)
    from its share p of the group's, L its longest sample, the sum over members.
    """
    weight = sum(member.weight for member in members)
    halves = sum(member.longest for member in members) / 2
    slack = min(
        m.slack - m.longest / (2 * m.weight) - (halves - m.longest) / weight for m in members
    )
    return Group(weight, max(member.longest for member in members), members, -1, slack)


def distances(group: Group) -> dict[int, Fraction]:
    """By source, how many tokens it can be from its share of a group's, in any prefix and whatever
    the samples' order: the sum of its part of what each group that it is in can be from its share
    of the next."""
    found: dict[int, Fraction] = {}

    def add(group: Group, away: Fraction) -> None:
        """`away`: of each unit of weight."""
        if not group.members:
            found[group.source] = away * group.weight
        if group.in_windows:
            for member in group.members:
                share = Fraction(member.weight, group.weight)
                add(
                    member,
                    away
                    + (member.longest * (1 - share) + share * group.longest / 2) / member.weight,
                )
            return
        halves = Fraction(sum(member.longest for member in group.members), 2)
        for member in group.members:
            own = Fraction(member.longest, 2 * member.weight)
            add(member, away + own + (halves - member.longest) / group.weight)

    add(group, Fraction(0))
    return found


@lru_cache(maxsize=64)
def merging(weights: tuple[int, ...], longest: tuple[int, ...]) -> Group:
    """How to merge sources so that each is always within the longest sample of any from its share.

    Up to four sources are so where they are merged by halves in the best of all ways (two pairs
    are, whatever the weights), and often five. Others stand in windows, which cost a few times as
    much. Windows of the lightest sources would be very long and are apart; to merge them with the
    others by halves adds no more than what `windows` leaves of a longest sample.

    No order at all can hold n sources closer than 1 - 1 / (2n - 2) samples.

    Args:
        weights: of each source, those of 0 are left out.
        longest: supervised tokens of each source's longest sample.
    """
    most = max(length for weight, length in zip(weights, longest) if weight)
    sources = tuple(
        Group(w, length, (), i, most / w)
        for i, (w, length) in enumerate(zip(weights, longest))
        if w
    )
    if len(sources) <= FEW:
        whole = best(sources)
        if max(distances(whole).values()) <= most:
            return whole
    weight, heaviest = sum(weights), max(weights)
    heavy = [
        each
        for each in sources
        if each.weight == heaviest or each.weight * WIDE * most >= each.longest * weight
    ]
    light = [each for each in sources if each not in heavy]
    parts = [
        in_windows(tuple(part)) if len(part) > 1 else part[0] for part in (heavy, light) if part
    ]
    return merged(tuple(parts)) if len(parts) > 1 else parts[0]


def in_windows(members: tuple[Group, ...]) -> Group:
    """One group of several sources, in windows."""
    return Group(
        sum(m.weight for m in members),
        max(m.longest for m in members),
        members,
        -1,
        0.0,
        in_windows=True,
    )


def groups_in(group: Group) -> list[Group]:
    """A group and all that are in it."""
    return [group] + [inner for member in group.members for inner in groups_in(member)]


def best(groups: tuple[Group, ...]) -> Group:
    """Of all ways to merge a few groups, the one that leaves most slack. Floats decide only between
    ways; they are added, multiplied, divided and rooted, which every machine does alike."""
    if len(groups) == 1:
        return groups[0]
    ways = [way for way in partitions(groups) if len(way) > 1]
    return max(
        (merged(tuple(best(tuple(members)) for members in way)) for way in ways),
        key=lambda group: group.slack,
    )


def partitions(items: tuple[Group, ...]) -> Iterator[list[list[Group]]]:
    """All ways to part items."""
    if not items:
        yield []
        return
    for way in partitions(items[1:]):
        yield [[items[0]], *way]
        for k, members in enumerate(way):
            yield [*way[:k], [items[0], *members], *way[k + 1 :]]


LEAST = 2**14
"""Draws that sums are made for at a time, at least: several epochs of a source that has fewer
samples."""
KEPT_SUMS = 2
"""Tables that are kept of each source: enough where an epoch ends and the next begins."""


class TokenSums:
    """Supervised tokens along a source's draws: the tokens of q epochs and r draws are q times
    those of the source and a prefix of one shuffle.

    A table holds the sums of one epoch, or of several short ones: 4 bytes a sample (8 where an
    epoch has 2^32 tokens). It is made when a draw in it is asked for, some 40 ns a sample, and
    depends on nothing else; looking up in it is a binary search.

    Args:
        lengths: supervised tokens of each sample, not all 0.
    """

    def __init__(self, lengths: np.ndarray, shuffle: Shuffle) -> None:
        self.lengths = lengths
        self.shuffle = shuffle
        self.longest = int(lengths.max())
        epochs = -(-LEAST // shuffle.size)
        self.draws = epochs * shuffle.size
        self.tokens = epochs * int(lengths.sum(dtype=np.int64))
        self.dtype = np.uint32 if self.tokens < 2**32 else np.int64
        self.tables: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without tables: a worker makes its own faster than it is sent them."""
        return self.__dict__ | {"tables": {}}

    def table(self, number: int) -> np.ndarray:
        """(draws + 1,) tokens before each draw of a table, from its start."""
        found = self.tables.pop(number, None)
        if found is None:
            while len(self.tables) >= KEPT:
                del self.tables[next(iter(self.tables))]
            found = np.zeros(self.draws + 1, dtype=self.dtype)
            first = number * self.draws
            # in parts, which stay in the processor's cache
            for start in range(0, self.draws, LEAST):
                stop = min(start + LEAST, self.draws)
                found[start + 1 : stop + 1] = self.lengths[
                    self.shuffle.between(first + start, first + stop)
                ]
            np.cumsum(found, out=found)
        self.tables[number] = found  # the last to go
        return found

    def before(self, draw: int) -> int:
        """Tokens of the first `draw` draws."""
        number, place = divmod(draw, self.draws)
        return number * self.tokens + (int(self.table(number)[place]) if place else 0)

    def reach(self, tokens: int) -> int:
        """The first draw that at least `tokens` stand before."""
        if tokens <= 0:
            return 0
        number = (tokens - 1) // self.tokens
        # of the table's kind, or it would be converted
        sought = np.array(tokens - number * self.tokens, dtype=self.dtype)
        return number * self.draws + int(self.table(number).searchsorted(sought))

    def between(self, start: int, stop: int) -> np.ndarray:
        """Tokens of each draw from `start` to before `stop`, int64 (stop - start,)."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            number, place = divmod(start, self.draws)
            last = min(self.draws, place + stop - start)
            parts.append(np.diff(self.table(number)[place : last + 1]).astype(np.int64))
            start += last - place
        return np.concatenate(parts)


class Draws:
    """A source's draws from one on, as if it were the first, and their tokens.

    Args:
        first: the draw of `sums` that is number 0 here.
    """

    def __init__(self, sums: TokenSums, first: int) -> None:
        self.sums = sums
        self.first = first
        self.offset = sums.before(first)

    def before(self, draw: int) -> int:
        """Tokens of the first `draw` draws."""
        return self.sums.before(self.first + draw) - self.offset

    def reach(self, tokens: int) -> int:
        """The first draw that at least `tokens` stand before."""
        return max(0, self.sums.reach(tokens + self.offset) - self.first)

    def between(self, start: int, stop: int) -> np.ndarray:
        """Tokens of each draw from `start` to before `stop`, int64 (stop - start,)."""
        return self.sums.between(self.first + start, self.first + stop)
