"""An index of tar shards: the k-th sample is reached without reading those before it."""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.types import DataError

BLOCK = 512
SAMPLE_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""A key, up to the first dot of the file's name, and an extension."""


class TarSamples(Sequence[dict[str, Any]]):
    """Samples of WebDataset shards by number: members that follow each other and share a name up to its first dot. Only the
    headers are read, once; a sample's members are read when it is asked for, by their offsets.

    An item is `{"id": name, extension: bytes, ...}`, extensions in lower case.

    Raises:
        DataError: a shard that is missing, compressed, damaged or cut short; at `[k]`, an extension that a sample has twice.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.extensions: dict[str, int] = {}
        places, first, keys, key_ends = array("q"), array("q"), bytearray(), array("q")
        for shard, file in enumerate(files):
            before = None
            for key, extension, offset, size in members_of(file):
                if key != before:
                    first.append(len(places) // 4)
                    keys += key.encode("utf-8", "surrogateescape")
                    key_ends.append(len(keys))
                    before = key
                number = self.extensions.setdefault(extension, len(self.extensions))
                places.extend((shard, number, offset, size))
        first.append(len(places) // 4)
        self.places = np.frombuffer(places, dtype=np.int64).reshape(-1, 4)
        """(members, 4): shard, extension, offset and size."""
        self.first = np.frombuffer(first, dtype=np.int64)
        self.keys = bytes(keys)
        self.key_ends = key_ends

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        key = self.keys[self.key_ends[index - 1] if index else 0 : self.key_ends[index]].decode("utf-8", "replace")
        sample: dict[str, Any] = {"id": key}
        names = list(self.extensions)
        members = self.places[self.first[index] : self.first[index + 1]].tolist()
        file = self.files[members[0][0]]
        try:
            with file.open("rb", buffering=0) as stream:
                for _, extension, offset, size in members:
                    if names[extension] in sample:
                        raise DataError(f"{file}: {key} has two members .{names[extension]}")
                    stream.seek(offset)
                    content = stream.read(size)
                    if len(content) < size:
                        raise DataError(f"{file}: {key}.{names[extension]} is cut short: the shard has changed")
                    sample[names[extension]] = content
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error
        return sample


def members_of(file: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, extension, offset, size) of each regular file in a tar whose name has an extension. Raises DataError."""
    for name, offset, size in tar_members(file):
        found = SAMPLE_MEMBER.fullmatch(name.removeprefix("./"))
        if found:
            yield found[1], found[2].lower(), offset, size


def tar_members(file: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular file in a tar: ustar, with the long names of GNU and pax.

    It is several times faster than tarfile, which also ends without a word at a damaged header, and at the end of the first
    of two tars in one file. Raises DataError, then and for what is no tar.
    """
    name, size, offset = None, None, 0
    try:
        with file.open("rb", buffering=0) as stream:
            descriptor, end = stream.fileno(), stream.seek(0, 2)
            while header := next_header(file, stream, offset):
                kind, data, length = header[156:157], offset + BLOCK, tarfile.nti(header[124:136])
                extends = kind in b"xLKg"
                length = length if size is None or extends else size
                offset = data + -(-length // BLOCK) * BLOCK
                if offset > end:
                    raise DataError(f"{file}: cut short: a member ends at byte {offset}, the file at {end}")
                if extends:
                    if kind != b"K":  # the long name of a link's target
                        name, size = long_name(os.pread(descriptor, length, data), kind, name, size)
                    continue
                if kind in b"0\x007":
                    yield name or short_name(header), data, length
                elif kind == b"S":
                    raise ValueError("a sparse file: pack it anew")
                name, size = None, None
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (tarfile.TarError, ValueError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{file}: before byte {offset}: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def next_header(file: Path, stream: Any, offset: int) -> bytes | None:
    """The 512 bytes of the member's header at `offset`, its sum checked; None at the end mark of a tar. Raises DataError."""
    header = os.pread(stream.fileno(), BLOCK, offset)
    filled = any(header)
    if len(header) == BLOCK and filled and right_sum(header):
        return header
    if offset == 0 and (filled or not header):
        raise DataError(f"{file}: not an uncompressed tar" + (": empty file" if not header else ""))
    if len(header) < BLOCK or filled:
        raise DataError(f"{file}: damaged or cut short at byte {offset}: expected a header or the end mark of a tar")
    stream.seek(offset)
    while chunk := stream.read(2**20):
        if any(chunk):
            raise DataError(f"{file}: goes on after its end mark at byte {offset}: two tars in one file? Pack them anew")
    return None


def right_sum(header: bytes) -> bool:
    """The sum that a header holds is that of its bytes, itself counted as spaces; some old writers took signed bytes."""
    try:
        written = tarfile.nti(header[148:156])
    except tarfile.TarError:
        return False
    return written == sum(header) - sum(header[148:156]) + 8 * ord(" ") or written in tarfile.calc_chksums(header)


def short_name(header: bytes) -> str:
    """A member's name as its own header has it."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def long_name(payload: bytes, kind: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """The name and size that a header before a member's own gives it: GNU's long name, or pax records `length key=value`.
    Raises ValueError for what cannot be followed."""
    if kind == b"L":
        return payload.partition(b"\0")[0].decode("utf-8", "surrogateescape"), size
    while payload:
        length = int(payload.partition(b" ")[0])
        if length < 5 or length > len(payload):
            raise ValueError("a pax record of a wrong length")
        key, _, value = payload[:length].partition(b" ")[2][:-1].partition(b"=")
        if key in (b"path", b"size") and kind == b"g":
            raise ValueError("a name or size for all members: pack it anew")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise ValueError("a sparse file: pack it anew")
        payload = payload[length:]
    return name, size
