"""Encoded samples -> a batch. B rows, T text positions, N images, I the most images of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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
    side: Literal["left", "right"] = "right"
    pack_to: int | None = None

    def __call__(self, items: Sequence[Encoded | Skipped]) -> Batch:
        """A batch of the items that are not skipped; where all are, of one row without anything to
        learn, so that a rank goes on with the others. Raises DataError for a sample longer than
        `pack_to`."""
        samples = [item for item in items if isinstance(item, Encoded)]
        skipped = [
            (item.source, item.sample, item.reason) for item in items if isinstance(item, Skipped)
        ]
        truncated = [
            (one.source, one.id, one.turns_removed) for one in samples if one.turns_removed
        ]
        segments: tuple[Any, ...] | None = None
        rows: Sequence[Encoded]
        if self.pack_to is None or not samples:
            rows = samples or [self.nothing()]
        else:
            packed = pack(samples, self.pack_to)
            samples = [sample for row in packed for sample in row]
            rows, segments = zip(*(join(row) for row in packed), strict=True)
        length = max(len(row.input_ids) for row in rows)
        pixels = [image for row in rows for image in row.pixel_values]
        starts_by_row = [self.starts(row, length) for row in rows]
        return Batch.of(
            input_ids=self.pad([row.input_ids for row in rows], length, self.pad_id),
            attention_mask=self.pad([torch.ones_like(row.input_ids) for row in rows], length, 0),
            labels=self.pad([row.labels for row in rows], length, -100),
            placeholder=self.pad([row.placeholder for row in rows], length, False),
            pixel_values=torch.stack(pixels or [torch.zeros(self.image_shape)]),
            image_positions=image_starts(starts_by_row, length),
            segment_ids=None if segments is None else self.pad(segments, length, 0),
            ids=[sample.id for sample in samples],
            sources=[sample.source for sample in samples],
            lengths=[len(sample.input_ids) for sample in samples],
            skipped=skipped,
            truncated=truncated,
            notes=counted_notes(samples),
        ).with_places()

    def nothing(self) -> Encoded:
        """A row of one padding token, which nothing is learned from."""
        pad = torch.tensor([self.pad_id])
        return Encoded(
            "", "", pad, torch.full((1,), -100), torch.zeros(1, dtype=torch.bool), [], []
        )

    def pad(self, rows: Sequence[Tensor], length: int, value: int | bool) -> Tensor:
        """Rows (T_i,) -> (B, T)."""
        out = torch.full((len(rows), length), value, dtype=rows[0].dtype)
        for filled, row in zip(out, rows, strict=True):
            start = length - len(row) if self.side == "left" else 0
            filled[start : start + len(row)] = row
        return out

    def starts(self, row: Encoded, length: int) -> list[int]:
        """Returns where the images of a row begin once it is padded to `length`."""
        padding = length - len(row.input_ids) if self.side == "left" else 0
        return [position + padding for position in row.image_positions]


def counted_notes(samples: Sequence[Encoded]) -> list[tuple[str, str, Note, int]]:
    """Each note of a source once, with the first sample that has it and how many do."""
    firsts: dict[tuple[str, Note], str] = {}
    counts: Counter[tuple[str, Note]] = Counter()
    for sample in samples:
        for note in sample.notes:
            firsts.setdefault((sample.source, note), sample.id)
            counts[sample.source, note] += 1
    return [
        (source, sample, note, counts[source, note]) for (source, note), sample in firsts.items()
    ]
