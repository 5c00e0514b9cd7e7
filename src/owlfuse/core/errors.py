"""The errors of owlfuse, and their one-line messages and exit codes."""

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
    """A mistake of the configuration or of the command line; its message is one line."""

    def __init__(self, message: str) -> None:
        # It may quote Hydra or YAML, whose messages have several lines.
        super().__init__(" ".join(message.split()))


def yaml_error(error: yaml.MarkedYAMLError) -> ConfigError:
    """Return the error of a file that is no YAML, with the file and the line."""
    mark = error.problem_mark
    location = f"{label(mark.name)}:{mark.line + 1}" if mark else COMMAND_LINE
    return ConfigError(f"{location}: not YAML: {error.problem or error.context}")


# Characters of a message. A path or an id may have any number.
MAX_MESSAGE = 600


class DataError(ValueError):
    """A mistake in the data.

    The message names the file or the sample, what was found and what was expected.
    """

    leave_out = False
    """True for a sample that is to be left out and counted whatever its source's `on_error`
    says."""


# What libraries raise for files that are not what they should be.
FILE_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Errors of the system about a disk or a path, and not about the program.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def disk_error_reason(error: BaseException) -> str | None:
    """Return the system's reason why a file could not be written, with the file where it is known;
    None for another error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            file = f"{cause.filename}: " if cause.filename else ""
            return file + os.strerror(cause.errno)
        cause = cause.__cause__
    return None


@contextmanager
def disk_errors_as_data_errors(folder: Path) -> Iterator[None]:
    """Raise DataError, with what can be done, where a file in a run's folder cannot be written."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        reason = disk_error_reason(error)
        if reason is None:
            raise
        advice = "make room or permit it, then run the same command again"
        if any((folder / "checkpoints").glob("step_*.ckpt")):
            advice = (
                "its checkpoints are as they were; make room or permit it, then go on with: "
                f"owlfuse train resume={folder}"
            )
        raise DataError(f"{folder} could not be written: {reason}; {advice}") from error


def report_errors(call: Callable[[], None], command: str) -> int:
    """Run a command and return its exit code.

    Errors that a user can mend become one line; other exceptions pass through.
    """
    try:
        call()
        return 0
    except KeyboardInterrupt as stop:
        print(visible(f"owlfuse: {str(stop) or 'interrupted'}"), file=sys.stderr)
        return 130
    except ConfigError as error:
        return failed(str(error), 2)
    except (DataError, FileNotFoundError, FileExistsError, MissingPackage) as error:
        return failed(" ".join(without_traceback(error).split()), 1)
    except OSError as error:
        reason = disk_error_reason(error)
        if reason is None:
            raise
        return failed(f"{command}: {reason}; make room or permit it, then run it again", 1)


def without_traceback(error: Exception) -> str:
    """Return an error's message; of a data worker's error, whose whole traceback torch makes the
    message, what the worker's own error said."""
    message = str(error)
    if "Original Traceback" not in message:
        return message
    return message.rpartition(f"{type(error).__name__}: ")[2]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def error_summary(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)[:160]}"


def failed(message: str, code: int) -> int:
    """Print an error in one line, and return the exit code."""
    print(f"owlfuse: error: {visible(message)}", file=sys.stderr)
    return code


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the word nearest to `word`, compared without case, or None where none is near."""
    by_lower_case = {candidate.lower(): candidate for candidate in words}
    matches = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """Return the nearest dotted key: a sibling first, then a key of the same name elsewhere, then
    any."""
    keys = list(keys)
    parent, _, name = key.rpartition(".")
    siblings, elsewhere = {}, []
    for candidate in keys:
        candidate_parent, _, candidate_name = candidate.rpartition(".")
        if candidate_parent == parent:
            siblings[candidate_name] = candidate
        if re.split(r"[./]", candidate)[-1] == name:
            elsewhere.append(candidate)
    # A misspelled key is most often in its right group.
    match = nearest(name, siblings) if parent else None
    if match:
        return siblings[match]
    if elsewhere:
        return nearest(key, elsewhere) or elsewhere[0]
    return nearest(key, keys)


def hint(word: str, words: Iterable[str], listed: int = 14) -> str:
    """Return `; did you mean 'x'? (there are: ...)`; the list only where it is short, and nothing
    where there are no words."""
    words = sorted(words)
    match = nearest(word, words)
    guess = f"; did you mean '{match}'?" if match else ""
    if 0 < len(words) <= listed:
        guess += f" (there are: {', '.join(words)})"
    return guess


def label(path: str | Path) -> str:
    """Return a path for messages: relative to the working folder where it is below it."""
    path = Path(path)
    if path.absolute().is_relative_to(Path.cwd()):
        return os.path.relpath(path)
    return str(path)


def one_line(message: str) -> str:
    """Return a message that can be printed: line breaks and control characters of a sample's id or
    path become escapes."""
    characters = []
    for character in message:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    line = "".join(characters)
    if len(line) <= MAX_MESSAGE:
        return line
    # A message begins with the file or sample, and ends with what was expected.
    return f"{line[: MAX_MESSAGE - 200]} ... {line[-195:]}"
