"""Fingerprints of a run's data, which a run that goes on and the cells of an ablation compare.

They are of a source's files (`files.fingerprint`) and of the pictures and videos that its records
name by paths. Contents count, and neither paths of folders nor times, so that data may be moved or
copied.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from owlfuse.core.errors import DataError
from owlfuse.data.formats.base import Source
from owlfuse.data.media.images import resolve_path

# Bytes of a file that are read at a time.
PIECE = 2**20
# Records of a source whose pictures count; of more, a seeded sample of so many.
MAX_RECORDS = 10_000
# Records with pictures after which a source none of whose pictures has a path is taken to hold its
# pictures in its own files.
FIRST_RECORDS = 64
# Bytes of pictures that are read. Of more, all sizes count, and the contents of a seeded sample of
# so many bytes.
MAX_BYTES = 2**27


def data_identity(
    sources: Mapping[str, Source], validation: Mapping[str, Source]
) -> dict[str, str]:
    """Return fingerprints by names as `data.sources.shapes` and `data.sources.shapes, its
    pictures`.

    Raises DataError.
    """
    fingerprints = {}
    for group, members in (("sources", sources), ("validation", validation)):
        for name, source in members.items():
            fingerprints[f"data.{group}.{name}"] = source.fingerprint()
            if pictures := pictures_fingerprint(source):
                fingerprints[f"data.{group}.{name}, its pictures"] = pictures
    return fingerprints


def pictures_fingerprint(source: Source) -> str | None:
    """Return a fingerprint of the pictures and videos that a source names by paths; None where it
    names none."""
    size = len(source)
    indices: Sequence[int] = range(size)
    if size > MAX_RECORDS:
        # The seed is the size alone, so that the same file gives the same sample everywhere.
        indices = sorted(random.Random(size).sample(range(size), MAX_RECORDS))
    paths: dict[str, None] = {}
    records_with_pictures = 0
    for index in indices:
        try:
            sample = source[index]
        except DataError:
            continue  # it is skipped or ends the run when it is drawn
        pictures = [*sample.images, *sample.videos]
        for path in pictures:
            if isinstance(path, str):
                paths[path] = None
        records_with_pictures += bool(pictures)
        if records_with_pictures == FIRST_RECORDS and not paths:
            return None
    return content_hash(source.root, paths) if paths else None


def content_hash(root: Path, paths: Iterable[str]) -> str:
    """Return a hash of files below a folder: of their names, sizes, and contents where they are no
    more than MAX_BYTES together."""
    sizes = {path: size_of(root, path) for path in sorted(paths)}
    digest = hashlib.sha256()
    for path, size in sizes.items():
        # Names of files need not be UTF-8, and then hold lone surrogates.
        digest.update(f"{path} {size}\n".encode("utf-8", "surrogatepass"))
    readable = [path for path, size in sizes.items() if size is not None]
    if sum(size or 0 for size in sizes.values()) > MAX_BYTES:
        # The seed is the count alone, so that the same files give the same sample everywhere.
        random.Random(len(readable)).shuffle(readable)
    bytes_read = 0
    for path in readable:
        bytes_read += sizes[path] or 0
        if bytes_read > MAX_BYTES:
            break
        # One that cannot be read is told when it is drawn.
        with suppress(OSError), (root / path).open("rb") as file:
            digest.update(hash_of(file, sizes[path] or 0))
    return digest.hexdigest()


def hash_of(file: BinaryIO, size: int) -> bytes:
    """Return a hash of the first `size` bytes of a file: some of the system have contents without
    an end beyond the size that they tell."""
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()


def size_of(root: Path, path: str) -> int | None:
    """Return the bytes of a file below a folder, None where there is none."""
    try:
        file = resolve_path(root, path, "")
        return file.stat().st_size if file.is_file() else None
    # One that is not below it is told when it is drawn.
    except (OSError, ValueError, DataError):
        return None
