"""Reading and writing files: atomic writes, fingerprints, and JSON within limits."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from owlfuse.core.errors import DataError


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yields a file that replaces `path` when the block succeeds, and is deleted when it fails.

    Its content is on the disk before it takes its name, so that a reader, or a machine that lost
    its power, sees the file of before or the new file, never a part of it.

    Args:
        mode: `w` for text in UTF-8, `wb` for bytes.
    """
    # Each writer has a temporary file by itself: ranks may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yields a temporary directory that takes the name `path` when the block succeeds, and is
    deleted when it fails.

    Raises:
        FileExistsError: `path` holds something.
        DataError: a library could not write into it.
    """
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)  # onto an empty folder too
    except Exception as error:
        # tokenizers and safetensors write by themselves: one raises a bare Exception, the other its
        # own, and no OSError
        if type(error) is Exception or isinstance(error, SafetensorError):
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path} could not be written: {reason}; make room or permit it, then run it again"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


WHOLE = 2**30
"""Bytes up to which a source's whole content is hashed."""
ENDS = 2**24
"""Bytes of each end of a larger file, shared out where there are several files."""
SHARE = 2**16
"""The least that a file gets of them."""


def expand_files(pattern: str) -> list[Path]:
    """The files that a path, braces (`{000..127}`, `{a,b}`) or a glob (`*`, `?`, `[...]`) stand
    for. Braces keep their order, a glob's matches are sorted.

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
    """`a{0..2}` and `a{0,1,2}` -> a0, a1, a2, several braces as their product; leading zeros are
    kept."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        width = (
            max(map(len, bounds.groups()))
            if any(b.startswith("0") and len(b) > 1 for b in bounds.groups())
            else 0
        )
        first, last = int(bounds[1]), int(bounds[2])
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for choice in choices for path in expand_braces(f"{before}{choice}{after}")]


def fingerprint(files: Sequence[Path]) -> str:
    """What the contents are told by. Up to 1 GB in all it is the SHA-256 of the content, as hex; of
    more files than one, `files:` and the SHA-256 of their digests in order. Above, `ends:` and the
    SHA-256 of each file's size and its first and last bytes (16 MB each of one file, shared out
    over more, at least 64 kB).

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
    return (
        digests[0]
        if len(digests) == 1
        else f"files:{hashlib.sha256(' '.join(digests).encode()).hexdigest()}"
    )


MAX_RECORD = 2**24
"""Bytes of one record of text: parsed JSON takes up to 30 times its size in memory, so a longer
one is refused unread."""


def check_record(size: int, what: str, limit: int = MAX_RECORD) -> None:
    """Raises DataError that begins with `what` for a record of more than `limit` bytes."""
    if size > limit:
        raise DataError(
            f"{what} has {size:,} bytes, over the limit of {limit:,} for one record; split it, or "
            "leave it out"
        )


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


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file with an indentation of two, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


MAX_CONFIG = 2**20
"""Bytes of a config.yaml or config.json."""


def read_text(file: Path, limit: int) -> str:
    """A text file.

    Raises DataError for one that is missing, larger than `limit` bytes, or not UTF-8.
    """
    try:
        with file.open("rb") as opened:
            raw = opened.read(limit + 1)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if len(raw) > limit:
        raise DataError(f"{file}: more than {limit:,} bytes, the limit for such a file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from None


MAX_JSON = 2**30
"""Bytes of a JSON file, which is parsed whole."""


def read_json(file: Path, kind: type = dict, limit: int = MAX_JSON) -> Any:
    """Returns the content of a JSON file that holds a `kind`.

    Raises DataError for one that is missing, over `limit` bytes, no JSON, or holds something else.
    """
    text = read_text(file, limit)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{file}: not JSON: {json_reason(error)[:120]}") from error
    if not isinstance(content, kind):
        raise DataError(f"{file}: holds a {type(content).__name__}, expected {WORDS[kind]}")
    return content


def read_json_if_there(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds, and an empty one where `read_json` raises."""
    try:
        return read_json(file)
    except DataError:
        return {}


def files_of(path: Path) -> dict[str, Path]:
    """The files of a checkpoint: `.` where it is one file, else by their places in the folder."""
    if path.is_file():
        return {".": path}
    return {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
}
