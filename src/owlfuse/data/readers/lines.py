"""Files of records: lines, reached by number without reading what stands before (JSON Lines, CSV
and TSV), and JSON."""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_RECORD, check_record, decoded, json_reason

CHUNK = 2**22
"""Bytes read at a time while the offsets are found; not mapped, so that the file's size does not
count as memory."""


class Lines(Sequence[bytes]):
    """The lines of a file that are not blank, by number from 0; 8 bytes of memory for each.

    Args:
        file: opened at once and read through once, for the offsets.
        quoted: a newline inside double quotes does not end a line (CSV).

    A line is read with `pread`, so that forked workers may share the open file. Pickled, it is its
    path alone.

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
        blank = [k for k in doubtful if is_blank(self.descriptor, int(starts[k]), int(ends[k]))]
        self.blank_before = np.array(blank, dtype=np.int64) - np.arange(len(blank))
        """For each blank line, how many lines that are not stand before it."""
        self.starts = np.delete(starts, blank) if blank else starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices
        """Without its newline and the blank lines after it. Raises IndexError, and DataError where
        the file became shorter, or for a line that is too long."""
        index = range(len(self))[index]
        start = int(self.starts[index])
        end = int(self.starts[index + 1]) if index + 1 < len(self) else self.size
        # asked first, since a line's number may take a look at the whole file
        if end - start > MAX_RECORD:
            check_record(end - start, f"{self.file}: line {self.number(index)}")
        raw = os.pread(self.descriptor, end - start, start)
        if len(raw) < end - start:
            raise DataError(
                f"{self.file}: line {self.number(index)}: the file has become shorter since it "
                "was opened"
            )
        text = len(raw.rstrip())
        newline = raw.find(b"\n", text)
        return raw if newline < 0 else raw[:newline].removesuffix(b"\r")

    def number(self, index: int) -> int:
        """The line's number in the file, from 1, blank lines counted, and those that a quoted
        field goes over."""
        if self.quoted:
            return 1 + int(np.searchsorted(self.newlines, self.starts[index]))
        return index + 1 + int(np.searchsorted(self.blank_before, index, side="right"))

    @cached_property
    def newlines(self) -> np.ndarray:
        """The offset of every newline of the file, of those in quotes too.

        Read when a message first needs it.
        """
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
    """The offset of each line, int64, and the indices of those that begin with white space, so
    that they may be blank."""
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
        doubtful.frombytes(
            (np.flatnonzero(chunk[begins] <= ord(" ")) + len(starts)).astype(np.int64).tobytes()
        )
        starts.frombytes((begins + offset).tobytes())
        offset += count
    return np.frombuffer(starts, dtype=np.int64), np.frombuffer(doubtful, dtype=np.int64)


def is_blank(descriptor: int, start: int, end: int) -> bool:
    """Whether a line holds white space alone, which is read a piece at a time."""
    while start < end:
        piece = os.pread(descriptor, min(CHUNK, end - start), start)
        if not piece or piece.strip():
            return not piece
        start += len(piece)
    return True


class JsonLines(Sequence[Any]):
    """A JSON value a line, each parsed when it is asked for; blank lines are left out.

    Raises:
        DataError: at `[k]`, for a line that is not UTF-8 or not JSON; it names file and line, and
            spares the others.
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
            reason = (
                str(error).lstrip(": ")
                if isinstance(error, DataError)
                else f"not JSON: {json_reason(error)}"
            )
            raise DataError(
                f"{self.lines.file}: line {self.lines.number(index)}: {reason}"
            ) from error


class Records(list[Any]):
    """The records of a JSON file that is parsed whole.

    Attributes:
        unused: keys of the object around the list, which nothing reads.
    """

    def __init__(self, records: Iterable[Any] = (), unused: Sequence[str] = ()) -> None:
        super().__init__(records)
        self.unused = unused


def open_records(
    file: Path, is_record: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Sequence[Any]:
    """The records of a JSON or JSON Lines file, which its contents tell apart and not its name: a
    list, a record a line, or an object with one list of records.

    Args:
        is_record: whether an object is a record by itself.

    Raises:
        DataError: a file that is missing, is not valid or holds something else.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(CHUNK)
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}") from error
    named_lines = file.suffix in (".jsonl", ".ndjson")
    as_lines = not STARTS_LIST.match(head) if named_lines else starts_with_line(head)
    return JsonLines(file) if as_lines else read_json_records(file, is_record)


STARTS_LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|$)")
"""The beginning of a list of objects, which no line of JSON Lines has."""


def starts_with_line(head: bytes) -> bool:
    """Whether a file begins with a line that is a JSON object, and goes on."""
    line, newline, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not line.startswith(b"{") or not newline or not rest.strip():
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def reason_of(error: OSError) -> str:
    """Why a file cannot be read."""
    return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)


def read_json_records(
    file: Path, is_record: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Records:
    """The records of a JSON file that holds a list, or an object with one list of records, parsed
    record by record; see `open_records`. Raises DataError."""
    try:
        size = file.stat().st_size
        if size <= MAX_RECORD:
            value = small_json(decoded(file.read_bytes(), str(file)), file)
        else:
            with file.open("rb") as opened:
                value = streamed_json(Text(opened, file))
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}") from error
    if isinstance(value, list):
        return Records(value)
    if not isinstance(value, dict):
        raise DataError(f"{file}: holds a {type(value).__name__}, expected a list of records")
    if is_record(value):
        return Records([value])
    return wrapped_records(value, file)


def wrapped_records(value: dict[str, Any], file: Path) -> Records:
    """The one list of records in an object. Raises DataError for none or several."""
    lists = [
        key
        for key, inner in value.items()
        if isinstance(inner, list) and inner and isinstance(inner[0], dict)
    ]
    if not lists:
        raise DataError(
            f"{file}: holds a dict, expected a list of records, or an object with one such list"
        )
    if len(lists) > 1:
        names = ", ".join(f"'{key}'" for key in lists)
        raise DataError(
            f"{file}: holds lists of records under {names}, expected one; write the one that is "
            "meant as a file"
        )
    return Records(value[lists[0]], [key for key in value if key != lists[0]])


def small_json(text: str, file: Path) -> Any:
    """What a JSON text holds. Raises DataError."""
    if not text.strip():
        raise DataError(f"{file}: holds no record")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {json_reason(error)}") from error


Decode: TypeAlias = Callable[[str, int], tuple[Any, int]]
SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls white space


def streamed_json(text: Text) -> Any:
    """A list of records, or an object with lists of them, each record parsed by itself, so that one
    that is too long is refused before it is parsed and the text is never in memory as a whole.

    Raises:
        DataError: what is wrong, with its line.
    """
    decode = json.JSONDecoder().raw_decode
    value: Any
    if text.peek() == "[":
        value = list(streamed_list(text, decode))
    elif text.peek() == "{":
        value = dict(streamed_object(text, decode))
    else:
        value = text.record(decode)
    if text.peek():
        raise text.error("Extra data")
    return value


def streamed_list(text: Text, decode: Decode) -> Iterator[Any]:
    """The records of a list that comes next. Raises DataError."""
    text.take()
    text.records = 0
    if text.peek() == "]":
        text.take()
        return
    while True:
        yield text.record(decode)
        if text.ends("]"):
            return


def streamed_object(text: Text, decode: Decode) -> Iterator[tuple[str, Any]]:
    """Keys and values of an object that comes next, its lists record by record.

    Raises DataError.
    """
    text.take()
    if text.peek() == "}":
        text.take()
        return
    while True:
        if text.peek() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.record(decode)
        if text.take() != ":":
            raise text.error("Expecting ':' delimiter")
        yield key, list(streamed_list(text, decode)) if text.peek() == "[" else text.record(decode)
        if text.ends("}"):
            return


class Text:
    """The text of a JSON file, of which a piece is in memory.

    Args:
        opened: the file, UTF-8.
        file: its name, for messages.
    """

    def __init__(self, opened: BinaryIO, file: Path) -> None:
        self.opened = opened
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.place = 0
        self.lines = 1
        self.read = 0
        self.ended = False
        self.records = 0

    def more(self, size: int = CHUNK) -> None:
        """Reads on; what was used is dropped."""
        self.lines += self.text.count("\n", 0, self.place)
        raw = self.opened.read(size)
        self.ended = not raw
        try:
            self.text = self.text[self.place :] + self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file}: not UTF-8 at byte {self.read + error.start}") from error
        self.read += len(raw)
        self.place = 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            # it matches nothing too
            self.place = SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.more()

    def take(self) -> str:
        """`peek`, and goes past it."""
        taken = self.peek()
        self.place += len(taken)
        return taken

    def ends(self, closing: str) -> bool:
        """Whether a list or an object ends, else goes past the comma.

        Raises DataError for anything else.
        """
        mark = self.take()
        if mark not in (",", closing):
            raise self.error("Expecting ',' delimiter")
        return mark == closing

    def record(self, decode: Decode) -> Any:
        """The JSON value that comes next. Raises DataError for one that is too long or no JSON."""
        self.peek()
        while True:
            try:
                value, end = decode(self.text, self.place)
            except RecursionError as error:
                raise self.error(json_reason(error)) from error
            except json.JSONDecodeError as error:
                if self.ended or self.is_wrong(error.pos):
                    self.place = min(error.pos, len(self.text))
                    raise self.error(error.msg) from error
                end = -1
            except ValueError as error:  # a number of thousands of digits
                raise self.error(json_reason(error)) from error
            # a number may go on in the next piece
            if end >= 0 and (end < len(self.text) or self.ended):
                check_record(
                    end - self.place,
                    f"{self.file}: record {self.records + 1}, in line {self.line()}",
                )
                self.place = end
                self.records += 1
                return value
            self.check_length()
            # all that one record may have, so that it is not parsed over and over
            self.more(MAX_RECORD)

    def is_wrong(self, place: int) -> bool:
        """Whether an error at this place of the piece would stay one if the text went on: not at
        its end, nor at a text that is not closed yet."""
        return place < len(self.text) - 100 and self.text[place] != '"'

    def check_length(self) -> None:
        """Raises DataError where the record is longer than one may be."""
        if len(self.text) - self.place > MAX_RECORD:
            raise DataError(
                f"{self.file}: record {self.records + 1}, in line {self.line()}, has more than "
                f"{MAX_RECORD:,} bytes, the limit "
                "for one record, or is no JSON; split it, or leave it out"
            )

    def line(self) -> int:
        """The number of the line that is being read, from 1."""
        return self.lines + self.text.count("\n", 0, self.place)

    def error(self, reason: str) -> DataError:
        """What is wrong at the place that is being read."""
        return DataError(f"{self.file}: line {self.line()}: not JSON: {reason}")
