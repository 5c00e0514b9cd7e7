"""An index of tar shards: the k-th sample is reached without reading those before it."""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.types import DataError

BLOCK = 512


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


def members_of(file: Path) -> Any:
    """(key, extension, offset, size) of each regular file in a tar whose name has an extension. Raises DataError."""
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it keeps them all otherwise
                found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name.removeprefix("./"), re.DOTALL)
                if found and member.isreg() and not member.issparse():
                    yield found[1], found[2].lower(), member.offset_data, member.size
            check_end(file, tar.fileobj, tar.offset)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{file}: not a whole, uncompressed tar: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def check_end(file: Path, stream: Any, offset: int) -> None:
    """A tar ends with zeros: tarfile stops without a word at a damaged header, and at the end of the first of two tars in
    one file."""
    stream.seek(offset)
    mark = stream.read(BLOCK)
    if len(mark) < BLOCK or mark.count(0) < BLOCK:
        raise DataError(f"{file}: damaged or cut short at byte {offset}: expected a header or the end mark of a tar")
    while chunk := stream.read(2**20):
        if chunk.count(0) < len(chunk):
            raise DataError(f"{file}: goes on after its end mark at byte {offset}: two tars in one file? Pack them anew")
