"""Several samples in one row, so that less of a batch is padding. T text positions.

Packing is a pure function of the samples of one batch, and with several ranks or accumulation steps
of one micro batch: what is drawn for a step is the same for any number of ranks, and only the rows
that it lies in are not. What the samples of a row must not share is told apart by
`Batch.segment_ids`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, Encoded

TRIED = 32
"""Row lengths looked at for a batch."""


def checked(pack_to: int | None, max_length: int) -> int | None:
    """`pack_to`, in tokens.

    Raises ValueError where a row could not hold a sample of `max_length`.
    """
    if pack_to is not None and pack_to < max_length:
        raise ValueError(
            f"pack_to is {pack_to} and max_length {max_length}: a row must hold the longest "
            "sample; "
            "raise pack_to or lower max_length"
        )
    return pack_to


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: from the longest on, each item goes into the row with the least space
    left that holds it.

    Returns:
        For each row the indices of its items in ascending order, the rows in the order of their
            first items. Of equal
        lengths the earlier comes first, and of equal rows the older is taken, so that the result
            depends on nothing else.

    Raises:
        ValueError: an item longer than `capacity`.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} is {length} long, and a row holds {capacity}")
        place = bisect_left(spaces, (length, -1))
        space, row = spaces.pop(place) if place < len(spaces) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(spaces, (space - length, row))
    return sorted(sorted(row) for row in rows)


def least_padding(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """`best_fit` to the row length that takes the fewest positions, of `TRIED` ones spread from the
    longest item to `capacity`; of equal ones the longest.

    Rows of the full capacity often leave the last one half empty, and rows are padded to the
    longest of their batch. Since the longest item is one of the lengths, there is never more
    padding than without packing.

    Raises:
        ValueError: an item longer than `capacity`.
    """
    longest = min(max(lengths, default=capacity), capacity)
    tried = sorted(
        {longest + (capacity - longest) * k // (TRIED - 1) for k in range(TRIED)}, reverse=True
    )
    return min(
        (best_fit(lengths, each) for each in tried), key=lambda rows: positions(rows, lengths)
    )


def positions(rows: list[list[int]], lengths: Sequence[int]) -> int:
    """What rows of those items take, padded to the longest."""
    return len(rows) * max((sum(lengths[i] for i in row) for row in rows), default=0)


def pack(samples: Sequence[Encoded], pack_to: int) -> list[list[Encoded]]:
    """The samples of each row, by `least_padding`.

    Raises DataError for a sample longer than `pack_to` tokens.
    """
    for sample in samples:
        if len(sample.input_ids) > pack_to:
            raise DataError(
                f"sample {sample.id} is {len(sample.input_ids)} tokens long, over pack_to of "
                f"{pack_to}: raise pack_to, "
                "or have it left out by a lower max_length"
            )
    return [
        [samples[i] for i in row]
        for row in least_padding([len(sample.input_ids) for sample in samples], pack_to)
    ]


def join(samples: Sequence[Encoded]) -> tuple[Encoded, Tensor]:
    """Samples as one, end to end, and their segment ids (T,): k, from 1, at the tokens of the k-th.

    The first token of a sample is not supervised, as it would be predicted from the last of the one
    before.
    """
    labels = [sample.labels.clone() for sample in samples]
    positions, before = [], 0
    for own, sample in zip(labels, samples, strict=True):
        own[:1] = -100
        positions += [before + position for position in sample.image_positions]
        before += len(own)
    joined = Encoded(
        id=" ".join(sample.id for sample in samples),
        source=" ".join(sample.source for sample in samples),
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        labels=torch.cat(labels),
        placeholder=torch.cat([sample.placeholder for sample in samples]),
        pixel_values=[image for sample in samples for image in sample.pixel_values],
        image_positions=positions,
        turns_removed=sum(sample.turns_removed for sample in samples),
        notes=[note for sample in samples for note in sample.notes],
    )
    return joined, torch.cat([torch.full((len(own),), k) for k, own in enumerate(labels, start=1)])


@dataclass
class Padding:
    """How much of some batches is padding: their tokens, the positions they would take with each
    sample in a row of its own (padded to the longest of its batch), and the positions they take."""

    tokens: int | Tensor = 0
    unpacked: int | Tensor = 0
    positions: int | Tensor = 0

    def add(self, batch: Batch) -> None:
        """Counts a batch, from plain numbers alone."""
        self.tokens += sum(batch.lengths)
        self.unpacked += len(batch.lengths) * max(batch.lengths, default=0)
        self.positions += batch.input_ids.numel()

    def include(self, tokens: Tensor, unpacked: Tensor, positions: Tensor) -> None:
        """Counts what was counted elsewhere, as whole numbers that do not lose any by growing
        large."""
        self.tokens, self.unpacked = self.tokens + tokens.long(), self.unpacked + unpacked.long()
        self.positions = self.positions + positions.long()

    def counts(self) -> tuple[int, int, int]:
        """The three as plain numbers."""
        return int(self.tokens), int(self.unpacked), int(self.positions)

    def shares(self) -> dict[str, float | Tensor]:
        """Of the positions those without a token, 0 to 1: `padding` as the batches are,
        `padding_unpacked` without packing.

        Raises:
            ZeroDivisionError: before a batch was counted.
        """
        return {
            "padding": 1 - self.tokens / self.positions,
            "padding_unpacked": 1 - self.tokens / self.unpacked,
        }
