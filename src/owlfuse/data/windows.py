"""The stream of several sources in which each sample stands in its window of time, however many sources there are."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from owlfuse.data.merging import Group
from owlfuse.data.token_sums import Draws

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
    """A sample that has begun before a time and ends after it, were all sources served at once, each by its share.

    Attributes:
        place: whose sample it is, among the members.
        given: of its length, what it is given before the time; in parts of a token, so that all numbers are whole.
        length: in such parts.
        begins, ends: tokens of all sources by which it would begin and end.
    """

    place: int
    given: int
    length: int
    begins: Fraction
    ends: Fraction


class Windows:
    """Samples in the order of when they must end, as soon as they may begin (WF2Q: Bennett and Zhang, Worst-case fair weighted
    fair queueing, 1996), in frames that are found one without another.

    Were all sources served at once, a sample would be served from S, what stands before it in its source / the source's share,
    to F. Here it begins at S - L / 2 at the earliest and ends at F + L / 2 at the latest, L the longest sample of any source:
    a source with longest sample l and share p is never further than l (1 - p) + p L / 2 from its share.

    Frames: at each multiple of `frame` tokens a cut says which of the samples that are under way there stand before it. The
    rest follows if (1) the cut puts at most L / 2 too much before it of any samples that end after some time, and (2) at most
    L / 2 too little of any that begin before some time. For then (2) what is left of a frame at any time cannot all begin
    L / 2 later or more, so that a sample may always begin; and (1) what must end by some time and stands behind the cut takes
    at most L / 2 longer than there is time.

    A cut moves what samples have been given there to those that both begin and end earlier, which makes (1) and (2) better, as
    long as there is a pair. Those then given a part only lie in each other, the first to begin the last to end, so that
    one order serves both: each is put before or behind the cut, so that sums of what this adds stay within L / 2.

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
        under_way = max(-(-member.longest * group.weight // member.weight) for member in group.members)
        self.frame = max(int(FRAME / pace), under_way)
        """Tokens of a frame: no sample is under way at two cuts."""
        most = max(member.weight for member in group.members) * self.frame + group.weight * 2 * group.longest
        self.step = max(1, min(STEP, 2**62 // most))
        self.cuts: dict[int, Cut] = {}
        self.frames: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without frames: a worker makes its own."""
        return self.__dict__ | {"frames": {}, "cuts": {}}

    def between(self, low: int, high: int) -> tuple[Cut, np.ndarray, np.ndarray]:
        """Frames that hold the samples that at least `low` tokens of the stream stand before, and fewer than `high`.

        Returns:
            What stands before the first sample; the samples' sources, uint16 (K,); their tokens, int64 (K,).
        """
        number = max(0, low // self.frame)
        if number and self.cut(number).tokens >= low:  # samples without tokens may end the frame before
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
        """Of each source the samples that would have ended, and of those under way the ones that stand before the cut."""
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
        """Samples between two cuts, in order. Times are counted from the first cut's, in parts of a token."""
        origin, first, last = number * self.frame, self.cut(number), self.cut(number + 1)
        sources, tokens, begins, ends = [], [], [], []
        for member, draws, start, stop in zip(self.members, self.draws, first.drawn, last.drawn, strict=True):
            near, rest = divmod(member.weight * origin, self.weight)
            lengths = draws.between(start, stop)
            after = np.cumsum(lengths) + (draws.before(start) - near)
            edges = [(self.weight * edge - rest) * self.step // member.weight for edge in (after - lengths, after)]
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
    """Jobs one after another from a time on, each time the one that must end first of those that may begin.

    Args:
        begins, ends, lengths: int64 (K,).

    Returns:
        The jobs' numbers in order, int64 (K,).
    """
    ranks = np.empty(len(ends), dtype=np.int64)
    by_end = ends.argsort(kind="stable")
    ranks[by_end] = np.arange(len(ends))
    by_begin = begins.argsort(kind="stable")
    waiting, begin, length = ranks[by_begin].tolist(), begins[by_begin].tolist(), lengths[by_end].tolist()
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
