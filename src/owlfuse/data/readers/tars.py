"""An index of tar shards: the k-th sample is reached without reading those before it."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from owlfuse.core.checkpoint_files import ZIP_ERRORS
from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_write, check_record
from owlfuse.data.readers.lines import reason_of

# A key, up to the first dot of the file's name, and an extension.
SAMPLE_MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
TEXT_EXTENSIONS = ("json", "txt", "text", "caption", "cls", "jsonl", "html", "xml", "csv", "tsv")
# Bytes of a sample's members together.
MAX_SAMPLE = 2**29
# Bytes of a header that holds a member's long name.
MAX_HEADER = 2**20
LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# GNU tar's type of a member that began in another file.
MULTIVOLUME = b"M"


class TarSamples(Sequence[dict[str, Any]]):
    """Samples of WebDataset shards by number: members that follow each other and share a name up to
    its first dot.

    The headers are read once, for the offset at which each sample begins, 8 bytes of memory for
    each; a sample's own headers and contents are read when it is asked for. An item is `{"id": key,
    extension: bytes, ...}`, extensions in lower case,
    and `ID` for that of a member `.id`.

    Args:
        index_dir: where the offsets are cached for the next opening; they are computed again when a
            shard's path, size or time of change differs. None: they are not cached.

    Raises:
        DataError: a shard that is missing, compressed, damaged or cut short; at `[k]`, an extension
            that a sample has twice.
    """

    def __init__(self, files: list[Path], index_dir: Path | None = None) -> None:
        self.files = files
        index = cached_index(files, index_dir) if index_dir else index_samples(files)
        self.starts, self.ends, self.first = index["starts"], index["ends"], index["first"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        shard = self.shard_of(index)
        start = int(self.starts[index])
        is_last = index + 1 == self.first[shard + 1]
        end = int(self.ends[shard] if is_last else self.starts[index + 1])
        sample: dict[str, Any] = {}
        key, total = "", 0
        with opened(self.files[shard]) as file:
            for member, key, extension in sample_members(file, start, end):
                # `id` is the sample's key; no other extension has upper case.
                if extension == "id":
                    extension = "ID"
                if extension in sample:
                    raise ValueError(f"{key} has two members .{extension}")
                total += member.size
                name = f"{printable(key)}.{extension}"
                # Parsed JSON takes many times its bytes, so texts have a lower limit than media.
                if extension.rpartition(".")[2] in TEXT_EXTENSIONS:
                    check_record(member.size, name)
                # All of a sample is in memory at once.
                if total > MAX_SAMPLE:
                    raise ValueError(
                        f"{name}: its sample has {total:,} bytes, over the limit of "
                        f"{MAX_SAMPLE:,}; keep large media in files"
                    )
                sample[extension] = read_content(file, member)
            if not sample:
                raise ValueError(f"no sample at byte {start}: it has changed since it was opened")
        return sample | {"id": printable(key)}

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.first, index, side="right")) - 1

    def key(self, index: int) -> str:
        """Return the id of the sample at `index`, from its first header alone."""
        start = int(self.starts[index])
        with opened(self.files[self.shard_of(index)]) as file:
            for _, key, _ in sample_members(file, start):
                return printable(key)
            raise ValueError(f"no sample at byte {start}: it has changed since it was opened")


def read_content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Return all of a member. Raises ValueError where the file became shorter."""
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError(
            f"cut short: a member ends at byte {member.offset_data + member.size}, the file at "
            f"{member.offset_data + len(content)}"
        )
    return content


def printable(key: str) -> str:
    """Return a key as a text, whatever bytes it has."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def index_samples(files: list[Path]) -> dict[str, np.ndarray]:
    """Read all headers of some shards.

    Returns:
        `starts`: where each sample begins in its shard; `ends`: where each shard's last member
            ends; `first`: the number of each shard's first sample, and of all samples.

    Raises:
        DataError: a shard that cannot be read, or whose samples are scattered.
    """
    starts, ends, first = array("q"), [], [0]
    for path in files:
        end, previous_key = 0, None
        # Hashes in arrays: the keys of millions of samples would take a hundred bytes each.
        keys, names = array("q"), array("q")
        with opened(path) as file:
            for member, key, extension in sample_members(file):
                if key != previous_key:
                    starts.append(member.offset)
                    # hash() will do, since only this process compares them
                    keys.append(hash(key))
                    previous_key = key
                names.append(hash((key, extension)))
                end = member.offset_data + member.size
            check_sorted(np.frombuffer(keys, np.int64), np.frombuffer(names, np.int64))
        first.append(len(starts))
        ends.append(end)
    start_offsets = np.frombuffer(starts, dtype=np.int64)
    return {"starts": start_offsets, "ends": np.array(ends), "first": np.array(first)}


def check_sorted(keys: np.ndarray, names: np.ndarray) -> None:
    """Raise ValueError for a shard whose samples are scattered: of `keys`, a hash of each sample's
    key, some come again, but of `names`, a hash of each key and extension, none."""
    distinct = len(np.unique(keys))
    if distinct < len(keys) and len(np.unique(names)) == len(names):
        raise ValueError(
            f"members of one sample do not follow each other ({distinct:,} names come "
            f"{len(keys):,} times): pack it anew, by tar --sort=name"
        )


def cached_index(files: list[Path], folder: Path) -> dict[str, np.ndarray]:
    """Return what `index_samples` finds, from `folder` if it is there, else written to it
    atomically. Raises DataError."""
    digest = hashlib.sha256()
    for file in files:
        with opened(file) as stream:
            # by the open file, since a path may be replaced between two looks
            status = os.fstat(stream.fileno())
        identity = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(identity.encode("utf-8", "surrogateescape"))
    path = folder / f"tar-index-2-{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(path) as cached:
            return {name: cached[name] for name in ("starts", "ends", "first")}
    except (*ZIP_ERRORS, KeyError):
        index = index_samples(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as stream:
            np.savez(stream, **index)  # type: ignore[arg-type]  # none is called allow_pickle
    except OSError as error:
        # The user asked for the cache, so that a folder that cannot be written is an error.
        raise DataError(f"index_dir: {folder}: {error.strerror}") from error
    return index


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; an error inside becomes a DataError that names the file."""
    try:
        with path.open("rb") as file:
            yield file
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}") from error


def sample_members(
    file: BinaryIO, start: int = 0, end: int | None = None
) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield each regular file in a tar that belongs to a sample, with the sample's key and the
    extension in lower case.

    Args:
        start: where a header is.
        end: where to stop; by default at the tar's end mark, which is checked then.

    Raises:
        ValueError, tarfile.TarError: no tar, a damaged one, or a sample's member that is a link.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=LimitedHeader, encoding="utf-8")
    except tarfile.ReadError as error:
        raise ValueError(f"not an uncompressed tar: {error}") from error
    member = tar.next()
    while member is not None:
        # tarfile would keep all of them; typeshed does not know the attribute
        tar.members.clear()  # type: ignore[attr-defined]
        # tar.offset is where the next header has to be.
        if tar.offset > size:
            raise ValueError(f"cut short: a member ends at byte {tar.offset}, the file at {size}")
        if {"path", "size"} & tar.pax_headers.keys():
            raise ValueError("a name or size for all members: pack it anew")
        if member.issparse() or member.type == MULTIVOLUME:
            raise ValueError(
                f"holds a sparse file or a part of one before byte {tar.offset}: pack it anew"
            )
        match = SAMPLE_MEMBER.fullmatch(member.name)
        if match and (member.islnk() or member.issym()):
            raise ValueError(
                f"{printable(member.name)} is a link: pack it anew, by tar --dereference "
                "--hard-dereference"
            )
        if match and member.isreg():
            yield member, match[1], match[2].lower()
        if end is not None and tar.offset >= end:
            return
        member = tar.next()
    check_end(file, tar.offset)


class LimitedHeader(tarfile.TarInfo):
    """A member's header. tarfile would read a long name of any size into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See `tarfile.TarInfo`."""
        header = super().frombuf(buf, encoding, errors)
        # a negative size would lead backwards, and tarfile round and round
        if header.size < 0 or (header.type in LONG_HEADERS and header.size > MAX_HEADER):
            raise ValueError(f"damaged: a header says {header.size:,} bytes; pack it anew")
        return header


def check_end(file: BinaryIO, offset: int) -> None:
    """Raise ValueError where a tar's end mark is not at `offset`, or something follows it: tarfile
    ends in silence there, and at a damaged header."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise ValueError(
            f"damaged or cut short at byte {offset}: expected a header or the end mark of a tar"
        )
    while chunk := file.read(2**20):
        if any(chunk):
            raise ValueError(
                f"goes on after its end mark at byte {offset}: two tars in one file? Pack them anew"
            )
