"""Encoded samples become a batch. B rows, T text positions, N images, I the most images of a
row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from owlfuse.core.types import Batch, Encoded, Note, Skipped, image_starts
from owlfuse.data.packing import join, pack


@dataclass
class Collator:
    """Pads rows to the longest, and puts one blank image into a batch without images.

    With `pack_to`, the samples of a batch share rows of at most so many tokens (see
    `packing.pack`). Nothing is carried over: every sample of the batch is in one row of it.
    """

    pad_id: int
    image_shape: tuple[int, int, int]
    """(3, H, W) of the blank image."""
    padding_side: Literal["left", "right"] = "right"
    pack_to: int | None = None

    def __call__(self, items: Sequence[Encoded | Skipped]) -> Batch:
        """Return a batch of the items that are not skipped; where all are, a batch of one row
        without a supervised token, so that a rank goes on with the others. Raises DataError for a
        sample longer than `pack_to`."""
        samples, skipped, truncated = [], [], []
        for item in items:
            if isinstance(item, Encoded):
                samples.append(item)
                if item.turns_removed:
                    truncated.append((item.source, item.id, item.turns_removed))
            else:
                skipped.append((item.source, item.sample, item.reason))
        segments: tuple[Any, ...] | None = None
        rows: Sequence[Encoded] = samples or [self.empty_row()]
        if self.pack_to is not None and samples:
            packed = pack(samples, self.pack_to)
            # The batch names its samples in the order of its rows.
            samples = list(itertools.chain(*packed))
            joined = [join(row) for row in packed]
            rows, segments = zip(*joined, strict=True)
        # Each batch is as long as its longest row: padding to a fixed length would cost more than
        # new shapes.
        length = max(len(row.input_ids) for row in rows)
        input_ids = [row.input_ids for row in rows]
        attention = [torch.ones_like(ids) for ids in input_ids]
        pixels = []
        for row in rows:
            pixels += row.pixel_values
        starts_by_row = [self.starts(row, length) for row in rows]
        return Batch.of(
            input_ids=self.pad(input_ids, self.pad_id),
            attention_mask=self.pad(attention, 0),
            labels=self.pad([row.labels for row in rows], -100),
            placeholder=self.pad([row.placeholder for row in rows], False),
            # The vision tower runs on every rank in every step, else collectives of sharded
            # parameters hang.
            pixel_values=torch.stack(pixels or [torch.zeros(self.image_shape)]),
            image_positions=image_starts(starts_by_row, length),
            segment_ids=None if segments is None else self.pad(segments, 0),
            ids=[sample.id for sample in samples],
            sources=[sample.source for sample in samples],
            lengths=[len(sample.input_ids) for sample in samples],
            skipped=skipped,
            truncated=truncated,
            notes=count_notes(samples),
        ).with_places()

    def empty_row(self) -> Encoded:
        """Return a row of one padding token, which is not supervised."""
        ids = torch.tensor([self.pad_id])
        placeholder = torch.zeros(1, dtype=torch.bool)
        return Encoded("", "", ids, torch.full((1,), -100), placeholder, [], [])

    def pad(self, rows: Sequence[Tensor], value: int | bool) -> Tensor:
        """Pad rows (T_i,) -> (B, T), T that of the longest."""
        return pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side
        )

    def starts(self, row: Encoded, length: int) -> list[int]:
        """Returns where the images of a row begin once it is padded to `length`."""
        padding = length - len(row.input_ids) if self.padding_side == "left" else 0
        return [position + padding for position in row.image_positions]


def count_notes(samples: Sequence[Encoded]) -> list[tuple[str, str, Note, int]]:
    """Return each note of a source once, with the first sample that has it and their number."""
    counts: dict[tuple[str, Note], tuple[str, int]] = {}
    for sample in samples:
        for note in sample.notes:
            first, count = counts.get((sample.source, note), (sample.id, 0))
            counts[sample.source, note] = first, count + 1
    notes = []
    for (source, note), (first, count) in counts.items():
        notes.append((source, first, note, count))
    return notes
