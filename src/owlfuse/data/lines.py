"""Files of lines, reached by number without reading what stands before: JSONL, CSV and TSV."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.types import DataError

CHUNK = 2**22
"""Bytes read at a time while the offsets are found; not mapped, so that the file's size does not count as memory."""


class Lines(Sequence[bytes]):
    """The lines of a file that are not blank, by number from 0; 8 bytes of memory for each.

    Args:
        file: opened at once and read through once, for the offsets.
        quoted: a newline inside double quotes does not end a line (CSV).

    A line is read with `pread`, so that forked workers may share the open file. Pickled, it is its path alone.

    Raises:
        DataError: a file that is missing or cannot be read.
    """

    def __init__(self, file: Path, quoted: bool = False) -> None:
        self.file = file
        self.quoted = quoted
        try:
            self.descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self.descriptor).st_size
            starts, doubtful = line_starts(self.descriptor, quoted)
        except FileNotFoundError:
            raise DataError(f"{file}: no such file") from None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error
        ends = np.append(starts[1:], self.size) if len(doubtful) else starts[:0]
        blank = [k for k in doubtful if not os.pread(self.descriptor, int(ends[k] - starts[k]), int(starts[k])).strip()]
        self.blank_before = np.array(blank, dtype=np.int64) - np.arange(len(blank))
        """For each blank line, how many lines that are not stand before it."""
        self.starts = np.delete(starts, blank) if blank else starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices
        """Without its newline and the blank lines after it. Raises IndexError, and DataError where the file became shorter."""
        index = range(len(self))[index]
        start = int(self.starts[index])
        end = int(self.starts[index + 1]) if index + 1 < len(self) else self.size
        raw = os.pread(self.descriptor, end - start, start)
        if len(raw) < end - start:
            raise DataError(f"{self.file}: line {self.number(index)}: the file has become shorter since it was opened")
        text = len(raw.rstrip())
        newline = raw.find(b"\n", text)
        return raw if newline < 0 else raw[:newline].removesuffix(b"\r")

    def number(self, index: int) -> int:
        """The line's number in the file, from 1, blank lines counted, and those that a quoted field goes over."""
        if self.quoted:
            return 1 + int(np.searchsorted(self.newlines, self.starts[index]))
        return index + 1 + int(np.searchsorted(self.blank_before, index, side="right"))

    @cached_property
    def newlines(self) -> np.ndarray:
        """The offset of every newline of the file, of those in quotes too. Read when a message first needs it."""
        found, offset = [np.empty(0, np.int64)], 0
        while chunk := os.pread(self.descriptor, CHUNK, offset):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
        return np.concatenate(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lines, (self.file, self.quoted)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def line_starts(descriptor: int, quoted: bool) -> tuple[np.ndarray, np.ndarray]:
    """The offset of each line, int64, and the indices of those that begin with white space, so that they may be blank."""
    starts, doubtful = array("q"), array("q")
    buffer = bytearray(CHUNK)
    offset = quotes = 0
    at_start = True
    while count := os.preadv(descriptor, [buffer], offset):
        chunk = np.frombuffer(buffer, dtype=np.uint8, count=count)
        ends = np.flatnonzero(chunk == ord("\n"))
        if quoted:
            marks = np.flatnonzero(chunk == ord('"'))
            ends = ends[(np.searchsorted(marks, ends) + quotes) % 2 == 0]
            quotes += len(marks)
        begins = np.concatenate([[0] if at_start else [], ends + 1]).astype(np.int64)
        at_start = bool(len(begins)) and int(begins[-1]) == count
        begins = begins[:-1] if at_start else begins
        doubtful.frombytes((np.flatnonzero(chunk[begins] <= ord(" ")) + len(starts)).astype(np.int64).tobytes())
        starts.frombytes((begins + offset).tobytes())
        offset += count
    return np.frombuffer(starts, dtype=np.int64), np.frombuffer(doubtful, dtype=np.int64)


class JsonLines(Sequence[Any]):
    """A JSON value a line, each parsed when it is asked for; blank lines are left out.

    Raises:
        DataError: at `[k]`, for a line that is not UTF-8 or not JSON; it names file and line, and spares the others.
    """

    def __init__(self, file: Path) -> None:
        self.lines = Lines(file)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        raw = self.lines[index]
        try:
            return json.loads(decoded(raw, ""))
        except (ValueError, RecursionError) as error:
            reason = str(error).lstrip(": ") if isinstance(error, DataError) else f"not JSON: {json_reason(error)}"
            raise DataError(f"{self.lines.file}: line {self.lines.number(index)}: {reason}") from error


def json_reason(error: Exception) -> str:
    """What was wrong with a text that is not JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def decoded(raw: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark. Raises DataError that says `where`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error


def read_json_list(file: Path) -> list[Any]:
    """A JSON file that holds one list, parsed whole. Raises DataError."""
    try:
        text = decoded(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{file}: holds no record")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with a record a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{file}: line {error.lineno}: not JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {json_reason(error)}") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: holds a {type(records).__name__}, expected a list of records")
    return records
