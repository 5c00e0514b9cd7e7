"""An index of tar shards: the k-th sample is reached without reading those before it."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_write, check_record

BLOCK = 512
SAMPLE_MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""A key, up to the first dot of the file's name, and an extension."""


TEXTS = ("json", "txt", "text", "caption", "cls", "jsonl", "html", "xml", "csv", "tsv")
"""Extensions of members that are text."""
MAX_SAMPLE = 2**29
"""Bytes of a sample's members together."""
MAX_HEADER = 2**20
"""Bytes of a header that holds a member's long name."""


class TarSamples(Sequence[dict[str, Any]]):
    """Samples of WebDataset shards by number: members that follow each other and share a name up to
    its first dot.

    The headers are read once, for the offset at which each sample begins, 8 bytes of memory for
    each; a sample's own headers and contents are read when it is asked for. An item is `{"id": key,
    extension: bytes, ...}`, extensions in lower case.

    Args:
        index_dir: where the offsets are kept for the next opening; they are found anew when a
            shard's path, size or time of change differs. None: they are not kept.

    Raises:
        DataError: a shard that is missing, compressed, damaged or cut short; at `[k]`, an extension
            that a sample has twice.
    """

    def __init__(self, files: list[Path], index_dir: Path | None = None) -> None:
        self.files = files
        index = kept_index(files, index_dir) if index_dir else find_samples(files)
        self.starts, self.ends, self.first = index["starts"], index["ends"], index["first"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        file, start = self.files[shard], int(self.starts[index])
        end = (
            int(self.ends[shard])
            if index + 1 == self.first[shard + 1]
            else int(self.starts[index + 1])
        )
        sample: dict[str, Any] = {}
        key, total = "", 0
        with opened(file) as descriptor:
            for _, name, data, size in tar_members(descriptor, start, end):
                if found := SAMPLE_MEMBER.fullmatch(name):
                    key, extension = found[1], found[2].lower()
                    if extension in sample:
                        raise ValueError(f"{key} has two members .{extension}")
                    total += size
                    check_member(f"{printable(key)}.{extension}", extension, size, total)
                    sample[extension] = content(descriptor, size, data)
            if not sample:
                raise ValueError(f"no sample at byte {start}: it has changed since it was opened")
        return sample | {"id": printable(key)}

    def key(self, index: int) -> str:
        """The id of the sample at `index`, from its first header alone."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        with opened(self.files[shard]) as descriptor:
            for _, name, _, _ in tar_members(descriptor, int(self.starts[index])):
                if found := SAMPLE_MEMBER.fullmatch(name):
                    return printable(found[1])
            raise ValueError(
                f"no sample at byte {self.starts[index]}: it has changed since it was opened"
            )


def check_member(name: str, extension: str, size: int, total: int) -> None:
    """Raises ValueError for a member that is too large to be read: texts are parsed, and all of a
    sample is in memory at once.

    Args:
        total: bytes of the sample's members so far, with this one.
    """
    if extension.rpartition(".")[2] in TEXTS:
        check_record(size, name)
    if total > MAX_SAMPLE:
        raise ValueError(
            f"{name}: its sample has {total:,} bytes, over the limit of {MAX_SAMPLE:,}; keep "
            "large media in files"
        )


def content(descriptor: int, size: int, offset: int) -> bytes:
    """All of a member, of which one call to the system gives 2 GB at most.

    Raises ValueError where the file became shorter.
    """
    parts, left = [], size
    while left:
        parts.append(os.pread(descriptor, left, offset + size - left))
        left -= len(parts[-1])
        if not parts[-1]:
            raise ValueError(
                f"cut short: a member ends at byte {offset + size}, the file at "
                f"{offset + size - left}"
            )
    return b"".join(parts)


def printable(key: str) -> str:
    """A key as a text, whatever bytes it has."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def find_samples(files: list[Path]) -> dict[str, np.ndarray]:
    """`starts`: where each sample begins in its shard; `ends`: where each shard's last member ends;
    `first`: the number of each shard's first sample, and of all samples. Raises DataError."""
    starts, ends, first = array("q"), [], [0]
    for file in files:
        with opened(file) as descriptor:
            end, key = 0, None
            keys, members = array("q"), array("q")
            for start, name, data, size in tar_members(descriptor):
                if found := SAMPLE_MEMBER.fullmatch(name):
                    if found[1] != key:
                        key = found[1]
                        starts.append(start)
                        keys.append(hash(key))
                    members.append(hash((key, found[2].lower())))
                end = data + size
            check_sorted(
                np.frombuffer(keys, dtype=np.int64), np.frombuffer(members, dtype=np.int64)
            )
        first.append(len(starts))
        ends.append(end)
    return {
        "starts": np.frombuffer(starts, dtype=np.int64),
        "ends": np.array(ends),
        "first": np.array(first),
    }


def check_sorted(keys: np.ndarray, members: np.ndarray) -> None:
    """Raises ValueError for a shard whose samples are scattered: of `keys`, a number for each
    sample's name, some come again, but of `members`, a number for each name and extension, none."""
    names = len(np.unique(keys))
    if names < len(keys) and len(np.unique(members)) == len(members):
        found = f"{names:,} names come {len(keys):,} times"
        raise ValueError(
            f"members of one sample do not follow each other ({found}): pack it anew, by tar "
            "--sort=name"
        )


def kept_index(files: list[Path], folder: Path) -> dict[str, np.ndarray]:
    """What `find_samples` finds, from `folder` if it is there, else written to it, whole or not
    at all. Raises DataError."""
    known = hashlib.sha256()
    for file in files:
        with opened(file) as descriptor:
            facts = os.fstat(descriptor)
        known.update(
            f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode(
                "utf-8", "surrogateescape"
            )
        )
    path = folder / f"tar-index-2-{known.hexdigest()[:32]}.npz"
    try:
        with np.load(path) as kept:
            return {name: kept[name] for name in ("starts", "ends", "first")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        index = find_samples(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as stream:
            np.savez(stream, **index)  # type: ignore[arg-type]  # none is called allow_pickle
    except OSError as error:
        raise DataError(f"index_dir: {folder}: {error.strerror}") from error
    return index


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A file's descriptor. What goes wrong inside is a DataError that names the file."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{file}: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def tar_members(
    descriptor: int, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, str, int, int]]:
    """(offset of its first header, name, offset of its content, size) of each regular file in a
    tar: ustar, with the long names of GNU and pax. From the header at `start` to `end`, or to the
    tar's end mark.

    It is several times faster than tarfile, which also ends without a word at a damaged header, and
    at the end of the first of two tars in one file. Raises ValueError, then, for what is no tar,
    and for a sample's member that is a link.
    """
    name, size, offset, whole = None, None, start, os.fstat(descriptor).st_size
    while (end is None or offset < end) and (header := next_header(descriptor, offset)):
        kind, data = header[156:157], offset + BLOCK
        length = tarfile.nti(header[124:136])  # type: ignore[attr-defined]
        extends = kind in b"xLKg"
        length = length if size is None or extends else size
        # of links, devices and folders: a size that nothing is stored of
        length = 0 if kind in b"123456" else length
        offset = data + -(-length // BLOCK) * BLOCK
        if length < 0 or offset > whole:
            raise ValueError(f"cut short: a member ends at byte {offset}, the file at {whole}")
        if extends:
            if length > MAX_HEADER:
                raise ValueError(
                    f"damaged: a header of {length:,} bytes before byte {offset}; pack it anew"
                )
            if kind != b"K":  # the long name of a link's target
                name, size = long_name(os.pread(descriptor, length, data), kind, name, size)
            continue
        name = name or short_name(header)
        if kind in b"0\x007":
            yield start, name, data, length
        elif kind in b"12" and SAMPLE_MEMBER.fullmatch(name):
            raise ValueError(
                f"{printable(name)} is a link: pack it anew, by tar --dereference "
                "--hard-dereference"
            )
        elif kind in b"SM":
            raise ValueError(
                f"holds a sparse file or a part of one before byte {offset}: pack it anew"
            )
        name, size, start = None, None, offset


def next_header(descriptor: int, offset: int) -> bytes | None:
    """The 512 bytes of the member's header at `offset`, its sum checked; None at the end mark of
    a tar. Raises ValueError."""
    header = os.pread(descriptor, BLOCK, offset)
    filled = any(header)
    if len(header) == BLOCK and filled and right_sum(header):
        return header
    if offset == 0 and (filled or not header):
        raise ValueError("not an uncompressed tar" + (": empty file" if not header else ""))
    if len(header) < BLOCK or filled:
        raise ValueError(
            f"damaged or cut short at byte {offset}: expected a header or the end mark of a tar"
        )
    place = offset
    while chunk := os.pread(descriptor, 2**20, place):
        if any(chunk):
            raise ValueError(
                f"goes on after its end mark at byte {offset}: two tars in one file? Pack them anew"
            )
        place += len(chunk)
    return None


def right_sum(header: bytes) -> bool:
    """The sum that a header holds is that of its bytes, itself counted as spaces; some old
    writers took signed bytes."""
    try:
        written = tarfile.nti(header[148:156])  # type: ignore[attr-defined]
    except tarfile.TarError:
        return False
    if written == sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return True
    return written in tarfile.calc_chksums(header)  # type: ignore[attr-defined]


def short_name(header: bytes) -> str:
    """A member's name as its own header has it."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def long_name(
    payload: bytes, kind: bytes, name: str | None, size: int | None
) -> tuple[str | None, int | None]:
    """The name and size that a header before a member's own gives it: GNU's long name, or pax
    records `length key=value`. Raises ValueError for what cannot be followed."""
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
