"""Notes about unused keys and assumptions of sources: each is logged once a source, and counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from owlfuse.core.types import Batch, Note

log = logging.getLogger(__name__)

# In how many draws a source had a note, by (source, note's text).
NoteCounts: TypeAlias = Counter[tuple[str, str]]


class BatchRemarks(NamedTuple):
    """What a batch lacks, and what was cut and noted of its samples (see the fields of `Batch`)."""

    skipped: list[tuple[str, str, str]]
    truncated: list[tuple[str, str, int]]
    notes: list[tuple[str, str, Note, int]]

    @classmethod
    def of(cls, batch: Batch) -> BatchRemarks:
        """Returns those of a batch."""
        return cls(batch.skipped, batch.truncated, batch.notes)


def text_of(note: Note) -> str:
    """Return a note as `mixture.json` has it."""
    return f"not used: {note.text}" if note.kind == "unused" else note.text


class NotesLog:
    """Logs each note of a source once, with the first sample that has it, and counts its draws."""

    def __init__(self) -> None:
        self.logged: dict[str, set[Note]] = {}
        self.counts: NoteCounts = Counter()

    def add(self, notes: Iterable[tuple[str, str, Note, int]]) -> None:
        """Log the new ones of (source, first sample, note, draws): a line for all unused keys of a
        sample, and one for each assumption."""
        new: dict[tuple[str, str], list[str]] = {}
        for source, sample, note, draws in notes:
            self.counts[source, text_of(note)] += draws
            logged = self.logged.setdefault(source, set())
            # A note of a whole source comes with every sample.
            if note in logged:
                continue
            logged.add(note)
            if note.kind == "unused":
                new.setdefault((source, sample), []).append(note.text)
            else:
                log.warning("source %s: %s (first in sample %s)", source, note.text, sample)
        for (source, sample), texts in new.items():
            log.warning(
                "source %s: not used: %s (first in sample %s)", source, ", ".join(texts), sample
            )
