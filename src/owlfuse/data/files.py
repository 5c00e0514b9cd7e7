"""Which files a source has, and what their contents are told by."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from owlfuse.types import DataError

WHOLE = 2**30
"""Bytes up to which a source's whole content is hashed."""
ENDS = 2**24
"""Bytes of each end of a larger file, shared out where there are several files."""
SHARE = 2**16
"""The least that a file gets of them."""


def expand_files(pattern: str) -> list[Path]:
    """The files that a path, braces (`{000..127}`, `{a,b}`) or a glob (`*`, `?`, `[...]`) stand for. Braces keep their order,
    a glob's matches are sorted.

    Raises:
        DataError: a file that is missing, or a glob without a match.
    """
    files: list[Path] = []
    for path in expand_braces(pattern):
        if Path(path).exists():
            files.append(Path(path))
        elif not glob.has_magic(path):
            raise DataError(f"{path}: no such file")
        elif matches := sorted(glob.glob(path, recursive=True)):
            files += map(Path, matches)
        else:
            raise DataError(f"{path}: no file matches")
    return files


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` and `a{0,1,2}` -> a0, a1, a2, several braces as their product; leading zeros are kept."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        width = max(map(len, bounds.groups())) if any(b.startswith("0") and len(b) > 1 for b in bounds.groups()) else 0
        first, last = int(bounds[1]), int(bounds[2])
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for choice in choices for path in expand_braces(f"{before}{choice}{after}")]


def fingerprint(files: Sequence[Path]) -> str:
    """What the contents are told by. Up to 1 GB in all it is the SHA-256 of the content, as hex; of more files than one,
    `files:` and the SHA-256 of their digests in order. Above, `ends:` and the SHA-256 of each file's size and its first and
    last bytes (16 MB each of one file, shared out over more, at least 64 kB).

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        sizes = [file.stat().st_size for file in files]
        if sum(sizes) > WHOLE:
            ends = max(SHARE, ENDS // len(files))
            whole = hashlib.sha256()
            for file, size in zip(files, sizes, strict=True):
                with file.open("rb") as stream:
                    whole.update(size.to_bytes(8, "little") + stream.read(ends))
                    stream.seek(max(0, size - ends))
                    whole.update(stream.read(ends))
            return f"ends:{whole.hexdigest()}"
        digests = []
        for file in files:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else f"files:{hashlib.sha256(' '.join(digests).encode()).hexdigest()}"
