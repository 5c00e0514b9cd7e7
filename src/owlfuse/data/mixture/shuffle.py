"""A source's order, epoch after epoch, as keyed permutations of which any part is computed by
itself: no array of its size.

A Feistel network on a grid of `rows * columns` places, the smallest that holds all samples (Black
and Rogaway, Ciphers with arbitrary finite domains, 2002: generalized Feistel with cycle walking).
Its round functions are a hash of 32 bits. Three rounds make a permutation that looks random from
outside (Luby and Rackoff, 1988); few samples take four, so that all orders occur.
"""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import numpy as np

ROUNDS = 4
"""Of the network, most: keys are made for so many."""
LONGEST = 2**32
STEP = 0x9E3779B97F4A7C15
MASK = 2**64 - 1
PART = 2**16
"""Draws that are computed at a time, so that they stay in the processor's cache."""


SHORT = 2**12
"""Samples of a source from which on an epoch's draws have one key in common."""


class Scratch(threading.local):
    """Arrays for a part, one set a thread: to ask the system for memory anew takes longer than
    to compute in it."""

    def __init__(self) -> None:
        self.count = np.arange(PART, dtype=np.uint32)
        self.arrays = [np.empty(PART, dtype=np.uint32) for _ in range(5)]
        self.samples = np.empty(PART, dtype=np.int64)

    def room(self, size: int) -> np.ndarray:
        """int64 (size,) to write samples into, written over after the next call: twice as fast
        as an array anew."""
        if len(self.samples) < size:
            self.samples = np.empty(size, dtype=np.int64)
        return self.samples[:size]


SCRATCH = Scratch()


class Shuffle:
    """Which sample of a source comes at its k-th draw. Every epoch is a new shuffle and holds every
    sample once.

    Args:
        size: samples of the source, from 1 to below 2^32.
        seed, source: what the shuffles depend on, besides the epoch.
    """

    def __init__(self, size: int, seed: int, source: int) -> None:
        if not 0 < size < LONGEST:
            raise ValueError(f"a source has {size} samples, expected from 1 to below 2^32")
        self.size = size
        self.rounds = ROUNDS if size < SHORT else ROUNDS - 1
        self.key = mixed(mixed(seed & MASK) ^ source * STEP & MASK)
        self.rows = math.isqrt(size - 1) + 1
        self.columns = -(-size // self.rows)

    def __getitem__(self, draw: int) -> int:
        """The sample at one draw from 0. O(1)."""
        epoch, place = divmod(draw, self.size)
        keys = [
            mixed(self.key + (epoch * ROUNDS + number) * STEP & MASK) >> 32
            for number in range(ROUNDS)
        ]
        while True:
            left, right = divmod(place, self.columns)
            for number in range(self.rounds):
                if number % 2:
                    right = (
                        right + reduced(hashed(left, keys[number]), self.columns)
                    ) % self.columns
                else:
                    left = (left + reduced(hashed(right, keys[number]), self.rows)) % self.rows
            place = left * self.columns + right
            if place < self.size:  # fails at most once in sqrt(size)
                return place

    def between(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """The samples of the draws from `start` to before `stop`, int64 (stop - start,); `out`
        is where to write them."""
        out = np.empty(stop - start, dtype=np.int64) if out is None else out
        first = start
        while first < stop:
            last = min(first + PART, stop)
            out[first - start : last - start] = self.part(first, last)
            first = last
        return out

    def part(self, start: int, stop: int) -> np.ndarray:
        """`between` for at most PART draws, uint32; what is returned is written over by the next
        call."""
        epoch, place = divmod(start, self.size)
        count = stop - start
        places = SCRATCH.arrays[0][:count]
        edges = [0, *range(self.size - place, count, self.size), count]  # where epochs begin
        keys = self.round_keys(epoch, len(edges) - 1)
        epochs = None
        if self.size < SHORT:
            draws = SCRATCH.count[:count] + np.uint32(place)
            epochs = draws // np.uint32(self.size)
            np.subtract(draws, epochs * np.uint32(self.size), out=places)
            self.permute(places, keys.take(epochs, axis=1))
        else:  # one key for a stretch is faster than a key for each of its draws
            for first, last in pairwise(edges):
                np.add(
                    SCRATCH.count[: last - first],
                    np.uint32(0 if first else place),
                    out=places[first:last],
                )
            self.permute(places, keys, edges)
        outside = np.flatnonzero(places >= self.size)
        while len(outside):
            again = places[outside]
            of_each = (
                np.searchsorted(edges, outside, "right") - 1 if epochs is None else epochs[outside]
            )
            self.permute(again, keys.take(of_each, axis=1))
            places[outside] = again
            outside = outside[again >= self.size]
        return places

    def round_keys(self, epoch: int, epochs: int) -> np.ndarray:
        """(ROUNDS, epochs) uint32 keys of the epochs from `epoch` on."""
        numbers = (
            np.arange(epochs, dtype=np.uint64) * np.uint64(ROUNDS)
            + np.arange(ROUNDS, dtype=np.uint64)[:, None]
        )
        keys = numbers * np.uint64(STEP) + np.uint64(self.key + epoch * ROUNDS * STEP & MASK)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((keys ^ (keys >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)

    def permute(self, places: np.ndarray, keys: np.ndarray, edges: list[int] | None = None) -> None:
        """One walk of an array of places through the network, in place; `keys` has a column for
        each place, or for each of the stretches between `edges`."""
        left, right, first, second = (array[: len(places)] for array in SCRATCH.arrays[1:])
        np.floor_divide(places, np.uint32(self.columns), out=left)
        np.subtract(places, np.multiply(left, np.uint32(self.columns), out=first), out=right)
        for number in range(self.rounds):
            side = np.uint32(self.columns if number % 2 else self.rows)
            other, moved = (left, right) if number % 2 else (right, left)
            if edges is None:
                np.bitwise_xor(other, keys[number], out=first)
            else:
                for key, start, stop in zip(keys[number], edges, edges[1:]):
                    np.bitwise_xor(other[start:stop], key, out=first[start:stop])
            np.multiply(first, np.uint32(0x85EBCA6B), out=first)
            np.right_shift(first, np.uint32(15), out=second)
            np.bitwise_xor(first, second, out=first)
            np.multiply(first, np.uint32(0xC2B2AE35), out=first)
            np.right_shift(first, np.uint32(16), out=first)
            np.multiply(first, side, out=first)
            np.right_shift(first, np.uint32(16), out=first)
            moved += first
            # modulo: below `side` it wraps to a large one
            np.minimum(moved, np.subtract(moved, side, out=second), out=moved)
        np.multiply(left, np.uint32(self.columns), out=left)
        np.add(left, right, out=places)


def mixed(number: int) -> int:
    """SplitMix64's output function: 64 bits in, 64 bits out, each of which depends on all."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)


def hashed(value: int, key: int) -> int:
    """The network's hash of 32 bits, of which the upper half is used."""
    value = (value ^ key) * 0x85EBCA6B & 0xFFFFFFFF
    return (value ^ (value >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF


def reduced(number: int, side: int) -> int:
    """32 bits -> below `side`, which is at most 2^16."""
    return (number >> 16) * side >> 16
