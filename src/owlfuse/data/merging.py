"""In which pairs the sources of a mixture are merged, and how far each can then be from its share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

FEW = 5
"""Sources of which all ways to merge them are tried."""
WIDE = 2**10
"""Longest samples in the time that a sample of a source takes to be due, where it shares windows with others."""


@dataclass(frozen=True)
class Group:
    """A source, or groups whose samples are merged into one stream.

    Attributes:
        weight: of all its sources.
        longest: tokens of the longest sample.
        members: none of a source.
        in_windows: whether its members' samples stand in windows of time (`windows`), not where half of each is due.
        source: its number, -1 of several.
        slack: tokens for each unit of weight that what its sources still may be away from their shares by.
    """

    weight: int
    longest: int
    members: tuple[Group, ...]
    source: int
    slack: float
    in_windows: bool = False


def merged(members: tuple[Group, ...]) -> Group:
    """One group of several.

    Samples come in the order of (tokens before it in its member + half its own) / the member's weight. At every point of that
    order a member is at most half of its longest sample from weight times a common time. Its tokens are then at most
    L / 2 + p * (sum of all members' L / 2 - L) from its share p of the group's, L its longest sample, the sum over members.
    """
    weight = sum(member.weight for member in members)
    halves = sum(member.longest for member in members) / 2
    slack = min(m.slack - m.longest / (2 * m.weight) - (halves - m.longest) / weight for m in members)
    return Group(weight, max(member.longest for member in members), members, -1, slack)


def distances(group: Group) -> dict[int, Fraction]:
    """By source, how many tokens it can be from its share of a group's, in any prefix and whatever the samples' order: the sum
    of its part of what each group that it is in can be from its share of the next."""
    found: dict[int, Fraction] = {}

    def add(group: Group, away: Fraction) -> None:
        """`away`: of each unit of weight."""
        if not group.members:
            found[group.source] = away * group.weight
        if group.in_windows:
            for member in group.members:
                share = Fraction(member.weight, group.weight)
                add(member, away + (member.longest * (1 - share) + share * group.longest / 2) / member.weight)
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

    Up to four sources are so where they are merged by halves in the best of all ways (two pairs are, whatever the weights), and
    often five. Others stand in windows, which cost a few times as much. Windows of the lightest sources would be very long and
    are apart; to merge them with the others by halves adds no more than what `windows` leaves of a longest sample.

    No order at all can hold n sources closer than 1 - 1 / (2n - 2) samples.

    Args:
        weights: of each source, those of 0 are left out.
        longest: supervised tokens of each source's longest sample.
    """
    most = max(length for weight, length in zip(weights, longest) if weight)
    sources = tuple(Group(w, length, (), i, most / w) for i, (w, length) in enumerate(zip(weights, longest)) if w)
    if len(sources) <= FEW:
        whole = best(sources)
        if max(distances(whole).values()) <= most:
            return whole
    weight, heaviest = sum(weights), max(weights)
    heavy = [each for each in sources if each.weight == heaviest or each.weight * WIDE * most >= each.longest * weight]
    light = [each for each in sources if each not in heavy]
    parts = [in_windows(tuple(part)) if len(part) > 1 else part[0] for part in (heavy, light) if part]
    return merged(tuple(parts)) if len(parts) > 1 else parts[0]


def in_windows(members: tuple[Group, ...]) -> Group:
    """One group of several sources, in windows."""
    return Group(sum(m.weight for m in members), max(m.longest for m in members), members, -1, 0.0, in_windows=True)


def groups_in(group: Group) -> list[Group]:
    """A group and all that are in it."""
    return [group] + [inner for member in group.members for inner in groups_in(member)]


def best(groups: tuple[Group, ...]) -> Group:
    """Of all ways to merge a few groups, the one that leaves most slack. Floats decide only between ways; they are added,
    multiplied, divided and rooted, which every machine does alike."""
    if len(groups) == 1:
        return groups[0]
    ways = [way for way in partitions(groups) if len(way) > 1]
    return max((merged(tuple(best(tuple(members)) for members in way)) for way in ways), key=lambda group: group.slack)


def partitions(items: tuple[Group, ...]) -> Iterator[list[list[Group]]]:
    """All ways to part items."""
    if not items:
        yield []
        return
    for way in partitions(items[1:]):
        yield [[items[0]], *way]
        for k, members in enumerate(way):
            yield [*way[:k], [items[0], *members], *way[k + 1 :]]
