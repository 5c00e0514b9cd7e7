"""Several samples in one row, so that less of a batch is padding. T text positions.

Packing is a pure function of the samples of one batch, and with several ranks or accumulation steps
of one micro batch: the samples of a step are the same for any number of ranks, and only their rows
are not. `Batch.segment_ids` separates the samples of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, Encoded

# Row lengths that are tried for a batch.
ROW_LENGTHS = 32


def check_pack_to(pack_to: int | None, max_length: int) -> int | None:
    """Return `pack_to`, in tokens.

    Raises ValueError where a row could not hold a sample of `max_length`.
    """
    if pack_to is not None and pack_to < max_length:
        raise ValueError(
            f"pack_to is {pack_to} and max_length {max_length}: a row must hold the longest "
            "sample; raise pack_to or lower max_length"
        )
    return pack_to


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items by best-fit decreasing: from the longest on, each item goes into the row with the
    least free space that holds it.

    Returns:
        For each row the indices of its items in ascending order, the rows in the order of their
            first items. Of equal lengths the earlier comes first, and of equal rows the older is
            used, so that the result depends on nothing else.

    Raises:
        ValueError: an item longer than `capacity`.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free space, row), ascending
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for index in longest_first:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} is {length} long, and a row holds {capacity}")
        # -1 is before every row, so that a space of exactly this length is found too.
        fitting = bisect_left(spaces, (length, -1))
        if fitting < len(spaces):
            space, row = spaces.pop(fitting)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(spaces, (space - length, row))
    return sorted(sorted(row) for row in rows)


def least_padding(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack by `best_fit` to the row length that takes the fewest positions, of `ROW_LENGTHS` ones
    spread from the longest item to `capacity`; of equal ones the longest.

    Rows of the full capacity often leave the last one half empty, and rows are padded to the
    longest of their batch. Since the longest item is one of the lengths, there is never more
    padding than without packing.

    Raises:
        ValueError: an item longer than `capacity`.
    """
    longest = min(max(lengths, default=capacity), capacity)
    row_lengths = set()
    for number in range(ROW_LENGTHS):
        extra = (capacity - longest) * number // (ROW_LENGTHS - 1)
        row_lengths.add(longest + extra)
    packings = [best_fit(lengths, row_length) for row_length in sorted(row_lengths, reverse=True)]
    # `min` returns the first of equal ones.
    return min(packings, key=lambda rows: positions(rows, lengths))


def positions(rows: list[list[int]], lengths: Sequence[int]) -> int:
    """Return the positions of rows of those items, padded to the longest."""
    row_lengths = [sum(lengths[index] for index in row) for row in rows]
    return len(rows) * max(row_lengths, default=0)


def pack(samples: Sequence[Encoded], pack_to: int) -> list[list[Encoded]]:
    """Return the samples of each row, by `least_padding`.

    Raises DataError for a sample longer than `pack_to` tokens.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    for sample, length in zip(samples, lengths, strict=True):
        if length > pack_to:
            raise DataError(
                f"sample {sample.id} is {length} tokens long, over pack_to of {pack_to}: raise "
                "pack_to, or have it left out by a lower max_length"
            )
    rows = []
    for indices in least_padding(lengths, pack_to):
        rows.append([samples[index] for index in indices])
    return rows


def join(samples: Sequence[Encoded]) -> tuple[Encoded, Tensor]:
    """Return samples as one, end to end, and their segment ids (T,): k, from 1, at the tokens of
    the k-th. The batch names its samples, so that the row has neither id nor notes.

    The first token of a sample is not supervised, as it would be predicted from the last of the one
    before.
    """
    joined = Encoded(
        id="",
        source="",
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        placeholder=torch.cat([sample.placeholder for sample in samples]),
        pixel_values=[],
        image_positions=[],
    )
    segment_ids = torch.zeros_like(joined.labels)
    start = 0
    for number, sample in enumerate(samples, start=1):
        # It would be predicted from the last token of another sample.
        joined.labels[start : start + 1] = -100
        joined.pixel_values += sample.pixel_values
        joined.image_positions += [start + position for position in sample.image_positions]
        stop = start + len(sample.input_ids)
        segment_ids[start:stop] = number
        start = stop
    return joined, segment_ids


@dataclass
class Padding:
    """Counts of padding in some batches: their tokens, their positions with each sample in a row by
    itself (padded to the longest of its batch), and their actual positions."""

    tokens: int | Tensor = 0
    unpacked: int | Tensor = 0
    positions: int | Tensor = 0

    def add(self, batch: Batch) -> None:
        """Count a batch, from plain numbers alone."""
        # `lengths` is a list of numbers, for which no device is waited.
        self.tokens += sum(batch.lengths)
        if batch.lengths:
            self.unpacked += len(batch.lengths) * max(batch.lengths)
        else:
            # All were skipped: the row that stands for them is padding, packed or not.
            self.unpacked += batch.input_ids.numel()
        self.positions += batch.input_ids.numel()

    def include(self, tokens: Tensor, unpacked: Tensor, positions: Tensor) -> None:
        """Add counts of other ranks."""
        # As whole numbers, which stay exact when they grow large.
        self.tokens = self.tokens + tokens.long()
        self.unpacked = self.unpacked + unpacked.long()
        self.positions = self.positions + positions.long()

    def counts(self) -> tuple[int, int, int]:
        """Return the three as plain numbers."""
        return int(self.tokens), int(self.unpacked), int(self.positions)

    def shares(self) -> dict[str, float | Tensor]:
        """Return the share of positions without a token, 0 to 1: `padding` as the batches are,
        `padding_unpacked` without packing.

        Raises:
            ZeroDivisionError: before a batch was counted.
        """
        return {
            "padding": 1 - self.tokens / self.positions,
            "padding_unpacked": 1 - self.tokens / self.unpacked,
        }
