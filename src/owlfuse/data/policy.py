"""What a wrong sample does: it stops the run, or is left out and counted, as its source's policy says."""

from __future__ import annotations

from collections.abc import Callable

from owlfuse.data.collate import Skipped
from owlfuse.data.formats.base import Source
from owlfuse.types import DataError, Encoded, Sample

LONGEST = 600
"""Characters of a message. A path or an id may have any number."""


def load_or_skip(load: Callable[[Sample, Source], Encoded], source: Source, index: int) -> Encoded | Skipped:
    """One sample of a source under its policy for wrong samples. Raises DataError where the policy is to stop."""
    try:
        return load(source[index], source)
    except DataError as error:
        error = source.placed(error, source.first_record(index))
        reason = one_line(str(error))
        if source.on_error == "skip" or error.leave_out:
            return Skipped(source.name, f"{source.name}:{index}", reason)
        raise DataError(reason) from error


def one_line(message: str) -> str:
    """A message that can be printed: what a sample's id or path holds of line breaks and control characters is written out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 200]} ... {shown[-195:]}"
