"""A source's order, epoch after epoch, as keyed permutations of which any part is computed by
itself: no array of its size.

A Feistel network on a grid of `rows * columns` cells, the smallest that holds all samples (Black
and Rogaway, Ciphers with arbitrary finite domains, 2002: generalized Feistel with cycle walking).
Its round functions are a hash of 32 bits. Three rounds make a permutation that looks random from
outside (Luby and Rackoff, 1988); few samples take four, so that all orders occur.
"""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import numpy as np

# Rounds of the network of a small source; keys are made for so many.
ROUNDS = 4
# Samples below which a source takes all rounds, and a key for each draw instead of each epoch.
SMALL = 2**12
# Samples are numbered in uint32.
MAX_SIZE = 2**32
# SplitMix64's step, 2^64 over the golden ratio.
STEP = 0x9E3779B97F4A7C15
MASK = 2**64 - 1
# Draws that are computed at a time, so that they stay in the processor's cache.
PART = 2**16


class Scratch(threading.local):
    """Arrays for a part, one set for each thread, for allocating memory anew would take longer than
    computing in it."""

    def __init__(self) -> None:
        self.count = np.arange(PART, dtype=np.uint32)
        self.arrays = [np.empty(PART, dtype=np.uint32) for _ in range(5)]
        self.samples = np.empty(PART, dtype=np.int64)


SCRATCH = Scratch()


def reused_samples(size: int) -> np.ndarray:
    """Return an int64 (size,) array of this thread for samples, overwritten after the next call."""
    if len(SCRATCH.samples) < size:
        SCRATCH.samples = np.empty(size, dtype=np.int64)
    return SCRATCH.samples[:size]


class Shuffle:
    """Says which sample of a source comes at its k-th draw. Every epoch is a new shuffle and holds
    every sample once.

    Args:
        size: samples of the source, from 1 to below 2^32.
        seed, source: what the shuffles depend on, besides the epoch.
    """

    def __init__(self, size: int, seed: int, source: int) -> None:
        if not 0 < size < MAX_SIZE:
            raise ValueError(f"a source has {size} samples, expected from 1 to below 2^32")
        self.size = size
        self.rounds = ROUNDS if size < SMALL else ROUNDS - 1
        self.key = mixed(mixed(seed & MASK) ^ source * STEP & MASK)
        self.rows = math.isqrt(size - 1) + 1
        self.columns = -(-size // self.rows)

    def between(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return the samples of the draws from `start` to before `stop`, int64 (stop - start,),
        written into `out` where it is given."""
        if out is None:
            out = np.empty(stop - start, dtype=np.int64)
        for first in range(start, stop, PART):
            last = min(first + PART, stop)
            out[first - start : last - start] = self.part(first, last)
        return out

    def part(self, start: int, stop: int) -> np.ndarray:
        """Return `between` for at most PART draws, uint32, which the next call overwrites."""
        epoch, first_cell = divmod(start, self.size)
        count = stop - start
        cells = SCRATCH.arrays[0][:count]
        # Where epochs begin, and both ends.
        edges = [0, *range(self.size - first_cell, count, self.size), count]
        keys = self.round_keys(epoch, len(edges) - 1)
        epochs = None
        if self.size < SMALL:
            draws = SCRATCH.count[:count] + np.uint32(first_cell)
            epochs = draws // np.uint32(self.size)
            np.subtract(draws, epochs * np.uint32(self.size), out=cells)
            self.permute(cells, keys.take(epochs, axis=1))
        else:
            # One key for all draws of an epoch is faster than a key for each draw.
            for first, last in pairwise(edges):
                begin = np.uint32(0 if first else first_cell)
                np.add(SCRATCH.count[: last - first], begin, out=cells[first:last])
            self.permute(cells, keys, edges)
        outside = np.flatnonzero(cells >= self.size)
        while len(outside):
            again = cells[outside]
            outside_epochs: np.ndarray
            if epochs is None:
                outside_epochs = np.searchsorted(edges, outside, "right") - 1
            else:
                outside_epochs = epochs[outside]
            self.permute(again, keys.take(outside_epochs, axis=1))
            cells[outside] = again
            outside = outside[again >= self.size]
        return cells

    def round_keys(self, epoch: int, epochs: int) -> np.ndarray:
        """Return the keys of the epochs from `epoch` on, uint32 (ROUNDS, epochs)."""
        first_numbers = np.arange(epochs, dtype=np.uint64) * np.uint64(ROUNDS)
        rounds = np.arange(ROUNDS, dtype=np.uint64)
        numbers = first_numbers + rounds[:, None]
        first_key = np.uint64(self.key + epoch * ROUNDS * STEP & MASK)
        keys = numbers * np.uint64(STEP) + first_key
        # SplitMix64, as in `mixed`; uint64 wraps by itself
        keys ^= keys >> np.uint64(30)
        keys *= np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(27)
        keys *= np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
        return (keys >> np.uint64(32)).astype(np.uint32)

    def permute(self, cells: np.ndarray, keys: np.ndarray, edges: list[int] | None = None) -> None:
        """Take an array of cells through the network, in place; `keys` has a column for each cell,
        or for each of the stretches between `edges`."""
        row, column, first, second = (array[: len(cells)] for array in SCRATCH.arrays[1:])
        columns = np.uint32(self.columns)
        np.floor_divide(cells, columns, out=row)
        np.multiply(row, columns, out=first)
        np.subtract(cells, first, out=column)
        for number in range(self.rounds):
            if number % 2:
                size, fixed, moved = columns, row, column
            else:
                size, fixed, moved = np.uint32(self.rows), column, row
            if edges is None:
                np.bitwise_xor(fixed, keys[number], out=first)
            else:
                for key, (start, stop) in zip(keys[number], pairwise(edges), strict=True):
                    np.bitwise_xor(fixed[start:stop], key, out=first[start:stop])
            np.multiply(first, np.uint32(0x85EBCA6B), out=first)
            np.right_shift(first, np.uint32(15), out=second)
            np.bitwise_xor(first, second, out=first)
            np.multiply(first, np.uint32(0xC2B2AE35), out=first)
            np.right_shift(first, np.uint32(16), out=first)
            np.multiply(first, size, out=first)
            np.right_shift(first, np.uint32(16), out=first)
            moved += first
            # The modulo: where `moved` is below `size`, the difference wraps to a large number.
            np.subtract(moved, size, out=second)
            np.minimum(moved, second, out=moved)
        np.multiply(row, columns, out=row)
        np.add(row, column, out=cells)


def mixed(number: int) -> int:
    """Return SplitMix64's output for 64 bits: 64 bits, each of which depends on all."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)
