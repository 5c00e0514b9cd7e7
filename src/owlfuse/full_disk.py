"""A disk that is full or cannot be written to ends a command with one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from owlfuse.types import DataError

REASONS: tuple[int, ...] = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
REASONS += (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of the system that are about the place where a file is written, and not about the program."""


def why_not_written(error: BaseException) -> str | None:
    """What the system says, with the file where it is known; None for an error that is about something else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in REASONS:
            place = f"{cause.filename}: " if cause.filename else ""
            return place + os.strerror(cause.errno)
        cause = cause.__cause__
    return None


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raises DataError, with what is left of the run, where anything that is written in its folder cannot be."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        checkpoints = any((folder / "checkpoints").glob("step_*.ckpt"))
        again = f"go on with: owlfuse train resume={folder}" if checkpoints else "run the same command again"
        kept = "its checkpoints are as they were; " if checkpoints else ""
        raise DataError(f"{folder} could not be written: {reason}; {kept}make room or permit it, then {again}") from error
