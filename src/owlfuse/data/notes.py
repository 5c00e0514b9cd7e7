"""What sources do not use of their records, or assume of them: told once for each source in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from owlfuse.types import Note

log = logging.getLogger(__name__)


class NotesLog:
    """Says each note of a source once, with the first sample that has it."""

    def __init__(self) -> None:
        self.logged: dict[str, set[Note]] = {}

    def add(self, notes: Iterable[tuple[str, str, Note]]) -> None:
        """Logs what is new of (source, sample, note) each: a line for all that a sample does not use, and one for each
        assumption."""
        new: dict[tuple[str, str], list[str]] = {}
        for source, sample, note in notes:
            logged = self.logged.setdefault(source, set())
            if note in logged:
                continue
            logged.add(note)
            if note.kind == "unused":
                new.setdefault((source, sample), []).append(note.text)
            else:
                log.warning("source %s: %s (first in sample %s)", source, note.text, sample)
        for (source, sample), texts in new.items():
            log.warning("source %s: not used: %s (first in sample %s)", source, ", ".join(texts), sample)
