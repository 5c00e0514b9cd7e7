"""Which source stands at each position, where the shares are of supervised tokens."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import lcm

import numpy as np

from owlfuse.data.schedule import Rules
from owlfuse.data.shuffle import Shuffle

BLOCK = 4096
"""Positions between two notes of how often each source was drawn; draws of a source that are looked up at a time."""

LONG = 2**18
"""Positions whose computing shows its progress."""


class TokenSchedule:
    """Shares in supervised tokens, by the rule of the worst-case fair queue: of the sources that are not ahead of their
    share, the one whose next sample would in fair time end first. A source is then at most the longest sample's tokens behind
    its share in every prefix of a phase, and at most its own longest sample's ahead (Bennett and Zhang, WF2Q, 1996).

    The order has no period, for each epoch is another shuffle. It is computed once up to the furthest position asked for, some
    300,000 positions a second, and kept: 2 bytes a position and 8 bytes a source each 4096. It depends on nothing else.
    """

    def __init__(self, rules: Rules, lengths: list[np.ndarray], shuffles: list[Shuffle]) -> None:
        self.rules = rules
        self.lengths = lengths
        self.shuffles = shuffles
        self.length: int | None = None
        self.position = 0
        self.now = np.zeros(len(lengths), dtype=np.int64)
        self.blocks: list[np.ndarray] = []
        self.notes: list[np.ndarray] = [self.now.copy()]
        self.coming: list[list[int]] = [[] for _ in lengths]
        """Tokens of each source's next draws, the next at the end."""
        self.begin()

    def begin(self) -> None:
        """Begins a phase, or what follows where a source dropped out: all sources stand even."""
        shares: list[Fraction] = self.rules.shares(self.position, self.now)
        if not shares:
            self.length = self.position
            return
        self.scale = lcm(*(share.denominator for share in shares))
        self.counts = [int(share * self.scale) for share in shares]
        self.active = [i for i, count in enumerate(self.counts) if count]
        self.served = [0] * len(shares)
        self.end = self.rules.phase_end(self.position)

    def reach(self, position: int) -> None:
        """Computes the order up to before `position`, and to a block's end."""
        blocks: Iterable[int] = range(self.position, position, BLOCK) if self.length is None else ()
        if position - self.position > LONG and self.length is None:
            from rich.console import Console
            from rich.progress import track

            blocks = track(blocks, "the order of samples by tokens", console=Console(stderr=True), transient=True)
        for _ in blocks:
            if self.length is not None:
                break
            block: list[int] = []
            while self.length is None and len(block) < BLOCK:
                self.advance(block)
            self.blocks.append(np.array(block, dtype=np.uint16))
            self.notes.append(self.now.copy())

    def advance(self, block: list[int]) -> None:
        """Positions up to the block's or the phase's end, or to where a source is used up."""
        start, drawn = len(block), self.now.tolist()
        limits = [
            size if end != "repeat" and count else None
            for size, end, count in zip(self.rules.sizes, self.rules.ends, self.counts)
        ]
        most = BLOCK if self.end is None else min(BLOCK, start + self.end - self.position)
        total, scale, counts, served, active, coming = (
            sum(self.served), self.scale, self.counts, self.served, self.active, self.coming,
        )  # fmt: skip
        while len(block) < most:
            chosen, least = -1, None
            for i in active:
                if served[i] * scale <= counts[i] * total:
                    if not coming[i]:
                        coming[i] = self.look_up(i, drawn[i])
                    finish = (served[i] + coming[i][-1]) / counts[i]
                    if least is None or finish < least:
                        chosen, least = i, finish
            tokens = coming[chosen].pop()
            served[chosen] += tokens
            total += tokens
            drawn[chosen] += 1
            block.append(chosen)
            if drawn[chosen] == limits[chosen]:
                break
        self.position += len(block) - start
        self.now[:] = drawn
        if self.position == self.end or (block and drawn[block[-1]] == limits[block[-1]]):
            self.begin()

    def look_up(self, source: int, draw: int) -> list[int]:
        """The tokens of the next draws, the last of them first."""
        return self.lengths[source][self.shuffles[source].between(draw, draw + BLOCK)].tolist()[::-1]

    def available(self, positions: int) -> int:
        """`positions`, or how many there are where the schedule ends before."""
        self.reach(positions)
        return positions if self.length is None else min(positions, self.length)

    def drawn(self, position: int) -> np.ndarray:
        """(S,) how many of the first `position` samples each source gives."""
        self.reach(position)
        block, offset = divmod(position, BLOCK)
        if not offset:
            return self.notes[block].copy()
        return self.notes[block] + np.bincount(self.blocks[block][:offset], minlength=len(self.now))

    def sources(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) the sources' numbers."""
        self.reach(stop)
        first = start // BLOCK
        parts = self.blocks[first : -(-stop // BLOCK)]
        if not parts:
            return np.empty(0, dtype=np.uint16)
        return np.concatenate(parts)[start - first * BLOCK : stop - first * BLOCK]
