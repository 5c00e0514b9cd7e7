"""What the data of a run are known by, so that a run that goes on, and the cells of an ablation,
have the same.

A source is known by its files (`files.fingerprint`) and by the pictures and videos that its records
name by paths. Of these the contents count, and neither places nor times, so that data may be moved
or copied.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from owlfuse.core.errors import DataError
from owlfuse.data.formats.base import Source

RECORDS = 10_000
"""Records of a source whose pictures are looked at; of more, a seeded sample of so many."""
LOOK = 64
"""Records after which a source none of whose pictures has a path is taken to hold its pictures
in its own files."""
WHOLE = 2**27
"""Bytes of pictures that are read whole.

Of more, all sizes count, and the contents of a seeded sample of so many bytes.
"""


def data_identity(
    sources: Mapping[str, Source], validation: Mapping[str, Source]
) -> dict[str, str]:
    """Fingerprints by names as `data.sources.shapes` and `data.sources.shapes, its pictures`.

    Raises DataError.
    """
    found = {}
    for group, members in (("sources", sources), ("validation", validation)):
        for name, source in members.items():
            found[f"data.{group}.{name}"] = source.fingerprint()
            if pictures := pictures_fingerprint(source):
                found[f"data.{group}.{name}, its pictures"] = pictures
    return found


def pictures_fingerprint(source: Source) -> str | None:
    """What the pictures and videos that a source names by paths are known by; None where it
    names none."""
    size = len(source)
    indices = (
        range(size) if size <= RECORDS else sorted(random.Random(size).sample(range(size), RECORDS))
    )
    paths: dict[str, None] = {}
    for number, index in enumerate(indices):
        if number == LOOK and not paths:
            return None
        try:
            sample = source[index]
        except DataError:
            continue  # it is skipped or ends the run when it is drawn
        paths |= dict.fromkeys(
            path for path in (*sample.images, *sample.videos) if isinstance(path, str)
        )
    return contents(source.root, paths) if paths else None


def contents(root: Path, paths: Iterable[str]) -> str:
    """A hash of files below a folder: of their names, sizes, and contents where they are no more
    than WHOLE together."""
    sizes = {path: size_of(root / path) for path in sorted(paths)}
    whole = hashlib.sha256()
    for path, size in sizes.items():
        whole.update(f"{path} {size}\n".encode())
    readable = [path for path, size in sizes.items() if size is not None]
    if sum(size or 0 for size in sizes.values()) > WHOLE:
        random.Random(len(readable)).shuffle(readable)
    left = WHOLE
    for path in readable:
        left -= sizes[path] or 0
        if left < 0:
            break
        with (root / path).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def size_of(path: Path) -> int | None:
    """Bytes of a file, None where there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
