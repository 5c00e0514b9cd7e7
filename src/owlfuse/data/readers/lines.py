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
from typing import Any, BinaryIO

import numpy as np

from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_RECORD, check_no_device, check_record, json_reason, parse_json
from owlfuse.core.types import JsonObject

# Bytes read at a time while the offsets are found; not mapped, so that the file's size does not
# count as memory.
CHUNK = 2**22


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
        check_no_device(file)
        try:
            # Windows has no O_CLOEXEC.
            self.descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self.descriptor).st_size
            check_uncompressed(os.pread(self.descriptor, 10, 0), file)
            starts, doubtful = line_starts(self.descriptor, quoted)
        except OSError as error:
            raise DataError(f"{file}: {reason_of(error)}") from error
        blank = []
        for number in doubtful:
            end = starts[number + 1] if number + 1 < len(starts) else self.size
            if is_blank(self.descriptor, int(starts[number]), int(end)):
                blank.append(number)
        self.blank_before = np.array(blank, dtype=np.int64) - np.arange(len(blank))
        """For each blank line, how many lines that are not stand before it."""
        self.starts = np.delete(starts, blank) if blank else starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices
        """Return a line without its newline and the blank lines after it. Raises IndexError, and
        DataError where the file became shorter, or for a line that is too long."""
        index = range(len(self))[index]
        start = int(self.starts[index])
        end = self.size
        if index + 1 < len(self):
            end = int(self.starts[index + 1])
        # A line's number is for the error alone: it may take reading the whole file.
        if end - start > MAX_RECORD:
            check_record(end - start, f"{self.file}: line {self.number(index)}")
        # pread moves no shared offset, so that forked workers do not disturb each other.
        raw = os.pread(self.descriptor, end - start, start)
        if len(raw) < end - start:
            raise DataError(
                f"{self.file}: line {self.number(index)}: the file has become shorter since it "
                "was opened"
            )
        # Blank lines that follow are in its bytes too: the first newline behind the text ends it.
        text = len(raw.rstrip())
        newline = raw.find(b"\n", text)
        return raw if newline < 0 else raw[:newline].removesuffix(b"\r")

    def number(self, index: int) -> int:
        """Return the line's number in the file, from 1, with blank lines and those that a quoted
        field goes over."""
        if self.quoted:
            return 1 + int(np.searchsorted(self.newlines, self.starts[index]))
        return index + 1 + int(np.searchsorted(self.blank_before, index, side="right"))

    @cached_property
    def newlines(self) -> np.ndarray:
        """The offset of every newline of the file, also inside quotes, int64.

        It is computed when a message first needs it.
        """
        offset, offsets = 0, [np.empty(0, np.int64)]
        while chunk := os.pread(self.descriptor, CHUNK, offset):
            positions = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            offsets.append(positions + offset)
            offset += len(chunk)
        return np.concatenate(offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker reads the offsets again: sending them takes longer for large files.
        return Lines, (self.file, self.quoted)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def line_starts(descriptor: int, quoted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the offset of each line, int64, and the indices of those that begin with white space,
    so that they may be blank."""
    # A list would take several times the 8 bytes of an array for each line.
    starts, doubtful = array("q"), array("q")
    # One buffer for all chunks: allocating 4 MB for each takes longer than scanning them.
    buffer = bytearray(CHUNK)
    offset = quotes = 0
    at_start = True
    while count := os.preadv(descriptor, [buffer], offset):
        chunk = np.frombuffer(buffer, dtype=np.uint8, count=count)
        ends = np.flatnonzero(chunk == ord("\n"))
        if quoted:
            # A newline ends a line only behind an even number of quotes.
            marks = np.flatnonzero(chunk == ord('"'))
            quotes_before = np.searchsorted(marks, ends) + quotes
            ends = ends[quotes_before % 2 == 0]
            quotes += len(marks)
        first = [0] if at_start else []
        begins = np.concatenate([first, ends + 1]).astype(np.int64)
        at_start = bool(len(begins)) and int(begins[-1]) == count
        if at_start:
            begins = begins[:-1]
        spaced = np.flatnonzero(chunk[begins] <= ord(" ")) + len(starts)
        doubtful.frombytes(spaced.astype(np.int64).tobytes())
        starts.frombytes((begins + offset).tobytes())
        offset += count
    return np.frombuffer(starts, dtype=np.int64), np.frombuffer(doubtful, dtype=np.int64)


def is_blank(descriptor: int, start: int, end: int) -> bool:
    """Whether a line holds white space alone; it is read a chunk at a time."""
    while start < end:
        chunk = os.pread(descriptor, min(CHUNK, end - start), start)
        if not chunk or chunk.strip():
            return not chunk
        start += len(chunk)
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
        line = self.lines[index]
        return parse_json(line, f"{self.lines.file}: line {self.lines.number(index)}")


class Records(list[Any]):
    """The records of a JSON file that is parsed whole.

    Attributes:
        unused: keys of the object around the list, which nothing reads.
    """

    def __init__(self, records: Iterable[Any], unused: Sequence[str] = ()) -> None:
        super().__init__(records)
        self.unused = unused


def open_records(file: Path, is_record: Callable[[JsonObject], bool]) -> Sequence[Any]:
    """Return the records of a JSON or JSON Lines file: a list, a record a line, or an object with
    one list of records. Which it is, its contents decide and not its name.

    Args:
        is_record: whether an object is a record by itself.

    Raises:
        DataError: a file that is missing, is not valid or holds something else.
    """
    check_no_device(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(CHUNK)
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}") from error
    check_uncompressed(head, file)
    if file.suffix in (".jsonl", ".ndjson"):
        # Some files of these names hold one list all the same.
        is_lines = not STARTS_LIST.match(head)
    else:
        is_lines = starts_with_line(head)
    return JsonLines(file) if is_lines else read_json_records(file, is_record)


# The beginning of a list of objects, which no line of JSON Lines has.
STARTS_LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|$)")


# The bytes that a compressed file begins with.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
}


def check_uncompressed(head: bytes, file: Path) -> None:
    """Raise DataError for a file that begins as a compressed one does."""
    for magic, name in COMPRESSIONS.items():
        if head.startswith(magic):
            raise DataError(
                f"{file}: compressed by {name}, and records are reached by their place in a file; "
                "decompress it, and name the file that comes of it"
            )


def starts_with_line(head: bytes) -> bool:
    """Whether a file begins with a line that is a JSON object, and goes on."""
    line, newline, following = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not line.startswith(b"{") or not newline or not following.strip():
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def reason_of(error: OSError) -> str:
    """Return why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return error.strerror or str(error)


def read_json_records(
    file: Path, is_record: Callable[[JsonObject], bool] = lambda _: False
) -> Records:
    """Return the records of a JSON file that holds a list, or an object with one list of records,
    parsed record by record; see `open_records`. Raises DataError."""
    try:
        with file.open("rb") as stream:
            value = stream_json(JsonText(stream, file))
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}") from error
    if isinstance(value, list):
        return Records(value)
    if not isinstance(value, dict):
        raise DataError(f"{file}: holds a {type(value).__name__}, expected a list of records")
    if is_record(value):
        return Records([value])
    return wrapped_records(value, file)


def wrapped_records(value: JsonObject, file: Path) -> Records:
    """Return the one list of records in an object. Raises DataError for none or several."""
    # Which list holds the records cannot be guessed where there are several.
    lists = []
    for key, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            lists.append(key)
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
    unused = [key for key in value if key != lists[0]]
    return Records(value[lists[0]], unused)


SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls white space


def stream_json(text: JsonText) -> Any:
    """Return a list of records, or an object with lists of them, each record parsed by itself, so
    that one that is too long is refused before it is parsed and the text is never in memory as a
    whole.

    Raises:
        DataError: what is wrong, with its line.
    """
    if not text.peek():
        raise DataError(f"{text.file}: holds no record")
    value = stream_object(text) if text.peek() == "{" else stream_value(text)
    if text.peek():
        raise text.error("Extra data")
    return value


def stream_value(text: JsonText) -> Any:
    """Return the value that comes next, a list record by record. Raises DataError."""
    if text.peek() != "[":
        return text.next_value()
    text.records = 0
    records = []
    for _ in text.entries("]"):
        records.append(text.next_value())
    return records


def stream_object(text: JsonText) -> JsonObject:
    """Return the object that comes next, its lists record by record. Raises DataError."""
    node: JsonObject = {}
    for _ in text.entries("}"):
        if text.peek() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.next_value()
        if text.skip() != ":":
            raise text.error("Expecting ':' delimiter")
        node[key] = stream_value(text)
    return node


class JsonText:
    """The text of a JSON file, of which a chunk is in memory.

    Args:
        stream: the file, UTF-8.
        file: its name, for messages.
    """

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self.stream = stream
        self.file = file
        self.decode_json = json.JSONDecoder().raw_decode
        # `-sig` leaves out the byte order mark that some editors write.
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.offset = 0
        """Of the next character in `text`."""
        self.lines = 1
        self.bytes_read = 0
        self.at_end = False
        self.records = 0

    def read(self, size: int = CHUNK) -> None:
        """Read on; the part of `text` before `offset` is dropped."""
        self.lines += self.text.count("\n", 0, self.offset)
        chunk = self.stream.read(size)
        self.at_end = not chunk
        try:
            # The incremental decoder keeps the bytes of a character that a chunk cuts.
            text = self.decoder.decode(chunk, final=self.at_end)
            self.text = self.text[self.offset :] + text
        except UnicodeDecodeError as error:
            position = self.bytes_read + error.start
            raise DataError(f"{self.file}: not UTF-8 at byte {position}") from error
        self.bytes_read += len(chunk)
        self.offset = 0

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            # The pattern matches the empty text too.
            self.offset = SPACE.match(self.text, self.offset).end()  # type: ignore[union-attr]
            if self.offset < len(self.text) or self.at_end:
                return self.text[self.offset : self.offset + 1]
            self.read()

    def skip(self) -> str:
        """Return `peek`, and go past it."""
        character = self.peek()
        self.offset += len(character)
        return character

    def entries(self, closing: str) -> Iterator[None]:
        """Go to each entry of the list or the object that comes next, then past its end.

        Raises DataError where an entry is followed by something else.
        """
        self.skip()
        if self.peek() == closing:
            self.skip()
            return
        while True:
            yield
            character = self.skip()
            if character == closing:
                return
            if character != ",":
                raise self.error("Expecting ',' delimiter")

    def next_value(self) -> Any:
        """Return the JSON value that comes next. Raises DataError for one that is too long or no
        JSON."""
        self.peek()
        while True:
            end = -1
            try:
                value, end = self.decode_json(self.text, self.offset)
            except json.JSONDecodeError as error:
                if self.at_end or self.is_wrong(error.pos):
                    self.offset = min(error.pos, len(self.text))
                    raise self.error(error.msg) from error
            except (RecursionError, ValueError) as error:  # ValueError: thousands of digits
                raise self.error(json_reason(error)) from error
            # A number at the end of the chunk may go on in the next one.
            if end >= 0 and (end < len(self.text) or self.at_end):
                if end - self.offset > MAX_RECORD:  # counting lines for each would take long
                    name = f"{self.file}: record {self.records + 1}, in line {self.line()}"
                    check_record(end - self.offset, name)
                self.offset = end
                self.records += 1
                return value
            if len(self.text) - self.offset > MAX_RECORD:
                raise DataError(
                    f"{self.file}: record {self.records + 1}, in line {self.line()}, has more than "
                    f"{MAX_RECORD:,} bytes, the limit for one record, or is no JSON; split it, or "
                    "leave it out"
                )
            # As much as one record may have, so that it is not parsed over and over.
            self.read(MAX_RECORD)

    def is_wrong(self, position: int) -> bool:
        """Whether an error at a position of the chunk would stay one if the text went on: not at
        its end, nor at a text that is not closed yet."""
        # 100: longer than any token but texts and numbers, which fail at their beginning.
        return position < len(self.text) - 100 and self.text[position] != '"'

    def line(self) -> int:
        """Return the number of the line that is being read, from 1."""
        return self.lines + self.text.count("\n", 0, self.offset)

    def error(self, reason: str) -> DataError:
        """Return the error of the text at `offset`."""
        return DataError(f"{self.file}: line {self.line()}: not JSON: {reason}")
