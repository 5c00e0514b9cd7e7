"""What sources do not use of their records, or assume of them: told once for each source in the
log, and counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

from owlfuse.core.types import Note

log = logging.getLogger(__name__)

NoteCounts: TypeAlias = Counter[tuple[str, str]]
"""In how many draws each (source, note's text) was met."""


def text_of(note: Note) -> str:
    """A note as `mixture.json` has it."""
    return f"not used: {note.text}" if note.kind == "unused" else note.text


class NotesLog:
    """Says each note of a source once, with the first sample that has it, and counts its draws."""

    def __init__(self) -> None:
        self.logged: dict[str, set[Note]] = {}
        self.counts: NoteCounts = Counter()

    def add(self, notes: Iterable[tuple[str, str, Note, int]]) -> None:
        """Logs what is new of (source, first sample, note, draws) each: a line for all that a
        sample does not use, and one for each assumption."""
        new: dict[tuple[str, str], list[str]] = {}
        for source, sample, note, draws in notes:
            self.counts[source, text_of(note)] += draws
            logged = self.logged.setdefault(source, set())
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
