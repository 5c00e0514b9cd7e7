"""The tokens of a source's first draws, and the draw that so many tokens stand before, without those in between."""

from __future__ import annotations

from typing import Any

import numpy as np

from owlfuse.data.shuffle import Shuffle

LEAST = 2**14
"""Draws that sums are made for at a time, at least: several epochs of a source that has fewer samples."""
KEPT = 2
"""Tables that are kept of each source: enough where an epoch ends and the next begins."""


class TokenSums:
    """Supervised tokens along a source's draws: the tokens of q epochs and r draws are q times those of the source and a prefix
    of one shuffle.

    A table holds the sums of one epoch, or of several short ones: 4 bytes a sample (8 where an epoch has 2^32 tokens). It is
    made when a draw in it is asked for, some 40 ns a sample, and depends on nothing else; looking up in it is a binary search.

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
            for start in range(0, self.draws, LEAST):  # in parts, which stay in the processor's cache
                stop = min(start + LEAST, self.draws)
                found[start + 1 : stop + 1] = self.lengths[self.shuffle.between(first + start, first + stop)]
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
        sought = np.array(tokens - number * self.tokens, dtype=self.dtype)  # of the table's kind, or it would be converted
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
