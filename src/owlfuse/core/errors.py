"""A disk that is full or cannot be written to ends a command with one line."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from owlfuse.core.packages import MissingPackage
from owlfuse.core.terminal import visible

if TYPE_CHECKING:
    import yaml

COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """A mistake of the configuration or of the command line, told in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def yaml_error(error: yaml.MarkedYAMLError) -> ConfigError:
    """Return the error of a file that is no YAML, with the file and the line."""
    mark = error.problem_mark
    location = f"{label(mark.name)}:{mark.line + 1}" if mark else COMMAND_LINE
    return ConfigError(f"{location}: not YAML: {error.problem or error.context}")


LONGEST = 600
"""Characters of a message. A path or an id may have any number."""


class DataError(ValueError):
    """Something is wrong with the data.

    The message names the file or the sample, what was found and what was expected.
    """

    leave_out = False
    """True for a sample that is to be left out and counted whatever its source's `on_error`
    says."""


REASONS: tuple[int, ...] = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
REASONS += (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of the system that are about the place where a file is written, and not about the
program."""


def why_not_written(error: BaseException) -> str | None:
    """What the system says, with the file where it is known; None for an error that is about
    something else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in REASONS:
            place = f"{cause.filename}: " if cause.filename else ""
            return place + os.strerror(cause.errno)
        cause = cause.__cause__
    return None


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raises DataError, with what is left of the run, where anything that is written in its
    folder cannot be."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        checkpoints = any((folder / "checkpoints").glob("step_*.ckpt"))
        again = (
            f"go on with: owlfuse train resume={folder}"
            if checkpoints
            else "run the same command again"
        )
        kept = "its checkpoints are as they were; " if checkpoints else ""
        raise DataError(
            f"{folder} could not be written: {reason}; {kept}make room or permit it, then {again}"
        ) from error


def report_errors(call: Callable[[], None], command: str) -> int:
    """Runs a command and returns its exit code.

    What a user can mend is said in one line; other exceptions pass through.
    """
    try:
        call()
        return 0
    except KeyboardInterrupt as stop:
        print(visible(f"owlfuse: {str(stop) or 'interrupted'}"), file=sys.stderr)
        return 130
    except ConfigError as error:
        return failed(str(error), 2)
    except (DataError, FileNotFoundError, FileExistsError) as error:
        # Of a data worker, torch hands on the whole traceback as the message.
        message = str(error).rpartition("DataError: ")[2]
        return failed(" ".join(message.split()), 1)
    except MissingPackage as error:
        return failed(str(error).rpartition("MissingPackage: ")[2].strip(), 1)
    except OSError as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        return failed(f"{command}: {reason}; make room or permit it, then run it again", 1)


def failed(message: str, code: int) -> int:
    """Tells an error in one line, and gives the exit code back."""
    print(f"owlfuse: error: {visible(message)}", file=sys.stderr)
    return code


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word nearest to `word`, compared without case, or None where none is near."""
    lower = {w.lower(): w for w in words}
    matches = difflib.get_close_matches(word.lower(), lower, n=1)
    return lower[matches[0]] if matches else None


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The nearest dotted key: a sibling first, then a key of the same name elsewhere, then any."""
    keys = list(keys)
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    if parent and (match := nearest(name, siblings)):
        return siblings[match]
    elsewhere = [k for k in keys if re.split(r"[./]", k)[-1] == name]
    return nearest(key, elsewhere) or (elsewhere[0] if elsewhere else nearest(key, keys))


def hint(word: str, words: Iterable[str], listed: int = 14) -> str:
    """`; did you mean 'x'? (there are: ...)`; the list only where it is short, and nothing where
    there are no words."""
    words = sorted(words)
    match = nearest(word, words)
    guess = f"; did you mean '{match}'?" if match else ""
    return guess + (f" (there are: {', '.join(words)})" if 0 < len(words) <= listed else "")


def label(path: str | Path) -> str:
    """A path as messages show it: relative to the working folder where it lies below it."""
    path = Path(path)
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def one_line(message: str) -> str:
    """A message that can be printed: what a sample's id or path holds of line breaks and control
    characters is written out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 200]} ... {shown[-195:]}"
