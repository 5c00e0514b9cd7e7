"""What a training has met in its data: samples left out and cut, notes, images and padding."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lightning import Trainer
from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch
from owlfuse.data.formats.base import Source
from owlfuse.data.notes import NoteCounts, NotesLog
from owlfuse.data.packing import Padding
from owlfuse.parallel.collectives import all_gather_objects

log = logging.getLogger(__name__)

Skips: TypeAlias = Counter[tuple[str, str, str]]
"""How many times each (source, sample, reason) was left out."""


@dataclass
class SampleTotals:
    """What was left out, cut and noted until some step."""

    skipped: Skips = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    """How many samples of each source were cut."""
    notes: NoteCounts = field(default_factory=Counter)

    def update(self, totals: SampleTotals) -> None:
        """Adds those of another rank."""
        self.skipped.update(totals.skipped)
        self.truncated.update(totals.truncated)
        self.notes.update(totals.notes)


class SampleCounts:
    """Counts what this rank's micro batches hold, and ends a run with too many wrong samples.

    Args:
        sources: by their names; each has a `max_skips`.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = sources
        self.skipped: Skips = Counter()
        self.truncated: Counter[str] = Counter()
        self.notes = NotesLog()
        self.images = 0
        self.padding = Padding()
        """`images` and `padding` are those of the step that is under way."""
        self.total_padding = Padding()
        """Over all whole steps and ranks."""
        self.of_last_step = SampleTotals()
        """The totals at the last whole step, which a checkpoint goes on from."""

    def add(self, batch: Batch) -> None:
        """Counts a micro batch, and logs each sample that was left out or cut.

        Raises DataError past a source's `max_skips`, and where no sample of a source is left.
        """
        # The blank picture of a batch without images is none.
        self.images += len(batch.pixel_values) * batch.has_images
        self.padding.add(batch)
        self.notes.add(batch.notes)
        for source, sample, turns in batch.truncated:
            self.truncated[source] += 1
            log.info(
                "truncated %s by %d turns (%d of source %s so far)",
                sample,
                turns,
                self.truncated[source],
                source,
            )
        for source, sample, reason in batch.skipped:
            self.skipped[source, sample, reason] += 1
            # A sample that is drawn again counts once: the limit is of samples, not of draws.
            count = distinct_samples(self.skipped)[source]
            log.warning("skipped %s (%d of source %s so far): %s", sample, count, source, reason)
            limit = self.sources[source].max_skips
            if count > limit:
                raise DataError(
                    f"source {source} had {count} wrong samples, over its max_skips of {limit}; "
                    f"the last: {reason}"
                )
            # Else the run would learn nothing of it, and of a single source nothing at all.
            if count == len(self.sources[source]):
                raise DataError(
                    f"all {count} samples of source {source} are wrong; the last: {reason}"
                )

    def row(self) -> list[Any]:
        """Returns the counts of a step that are added up over the ranks: images, three of padding,
        and the samples skipped so far of each source."""
        # so far and not of the step, since the limit is of the whole run
        samples = distinct_samples(self.skipped)
        return [
            self.images,
            *(self.padding.tokens, self.padding.unpacked, self.padding.positions),
            *(samples[source] for source in self.sources),
        ]

    def end_step(self, rows: Tensor) -> dict[str, Any]:
        """Closes a step and returns what is logged of it.

        Args:
            rows: the `row` of every rank: (ranks, 4 + sources).
        """
        padding = rows[:, 1:4].sum(0)
        shares = Padding(*padding).shares()
        metrics: dict[str, Any] = {f"data/{name}": share for name, share in shares.items()}
        images = rows[:, 0]
        metrics["data/images"] = images.sum()
        if len(images) > 1:
            metrics["data/images_least"] = images.min()
            metrics["data/images_most"] = images.max()
            metrics["data/ranks_without_images"] = (images == 0).double().sum()

        self.total_padding.include(*padding)
        self.images, self.padding = 0, Padding()
        # a copy, which the micro batches of the next step do not change
        self.of_last_step = self.totals()
        return metrics

    def check_ranks(self, trainer: Trainer, rows: Tensor) -> None:
        """Raises DataError, on every rank, where the ranks together skipped more samples of a
        source than its `max_skips`, or all of them.

        A sample that several ranks met is in the rows several times, so the samples themselves are
        compared where the sum is over the limit.
        """
        counts = rows[:, 4:].sum(0).tolist()
        sources = self.sources.values()
        limits = [min(source.max_skips, len(source) - 1) for source in sources]
        if all(count <= limit for count, limit in zip(counts, limits, strict=True)):
            return
        samples = distinct_samples(over_ranks(trainer, self.totals()).skipped)
        for name, source in self.sources.items():
            if samples[name] > source.max_skips:
                raise DataError(
                    f"source {name} had {samples[name]} wrong samples on all ranks together, over "
                    f"its max_skips of {source.max_skips}; each is in the log of its rank"
                )
            if samples[name] == len(source):
                raise DataError(
                    f"all {len(source)} samples of source {name} are wrong; each is in the log of "
                    "its rank"
                )

    def totals(self) -> SampleTotals:
        """Returns a copy of what this rank has left out, cut and noted so far."""
        return SampleTotals(
            Counter(self.skipped), Counter(self.truncated), Counter(self.notes.counts)
        )

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Puts the totals of all ranks at the last whole step into a checkpoint."""
        totals = over_ranks(trainer, self.of_last_step)
        checkpoint["skipped"] = [[*skip, times] for skip, times in totals.skipped.items()]
        checkpoint["truncated"] = dict(totals.truncated)
        checkpoint["notes"] = [[*note, draws] for note, draws in totals.notes.items()]
        checkpoint["padded"] = self.total_padding.counts()

    def load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Goes on counting from a checkpoint, which may lack what older versions did not keep."""
        if trainer.is_global_zero:  # the checkpoint's are those of all ranks
            for source, sample, reason, *times in checkpoint.get("skipped", []):
                # older versions kept a row for each time
                self.skipped[source, sample, reason] += times[0] if times else 1
            self.truncated.update(checkpoint.get("truncated", {}))
            for source, text, draws in checkpoint.get("notes", []):
                self.notes.counts[source, text] = draws
        # An error in the first step leaves what the checkpoint held.
        self.of_last_step = self.totals()
        self.total_padding = Padding(*checkpoint.get("padded", ()))


def over_ranks(trainer: Trainer, totals: SampleTotals) -> SampleTotals:
    """Returns the totals of all ranks together. All ranks call it."""
    merged = SampleTotals()
    for rank_totals in all_gather_objects(trainer, totals):
        merged.update(rank_totals)
    return merged


def distinct_samples(skipped: Iterable[tuple[str, str, str]]) -> Counter[str]:
    """Returns how many samples of each source were skipped, however often each was drawn."""
    return Counter(source for source, _ in {(source, sample) for source, sample, _ in skipped})
