"""Reading and writing files: atomic writes, fingerprints, and JSON within limits."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from owlfuse.core.errors import DataError


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a file that replaces `path` when the block succeeds, and is deleted when it fails.

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
            # Without fsync, a rename may reach the disk before the content.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary directory that takes the name `path` when the block succeeds, and is
    deleted when it fails.

    Raises:
        FileExistsError: `path` holds something.
        DataError: a library could not write into it.
    """
    # `.` has no name, and nothing can take that of a link
    path = Path(path).expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)  # onto an empty folder too
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOTEMPTY:
            raise FileExistsError(
                f"{path} was written by another process meanwhile; choose another folder"
            ) from error
        # tokenizers raises a bare Exception, and safetensors its own, where the system raises an
        # OSError.
        if type(error) is Exception or isinstance(error, SafetensorError):
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path} could not be written: {reason}; make room or permit it, then run it again"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Bytes up to which a source's whole content is hashed.
MAX_HASHED = 2**30
# Bytes of each end of a larger file that are hashed, divided by the number of files.
END_BYTES = 2**24
# The least bytes of an end.
MIN_END_BYTES = 2**16


# Paths that the braces of a pattern stand for; the largest data sets have some 100,000 shards.
MAX_PATHS = 1_000_000


def expand_files(pattern: str) -> list[Path]:
    """Return the files of a path, braces (`{000..127}`, `{a,b}`) or a glob (`*`, `?`, `[...]`).
    Braces keep their order, a glob's matches are sorted.

    Raises:
        DataError: a file that is missing or a device, a glob without a match, or braces for too
            many files.
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
    for file in files:
        check_no_device(file)
    return files


def check_no_device(file: Path) -> None:
    """Raise DataError for a pipe, of which opening waits for a writer, and a device, which has no
    end; a folder and what is missing are refused by whoever reads it."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise DataError(f"{file}: a device or a pipe, expected a file")


def expand_braces(pattern: str) -> list[str]:
    """Return a0, a1, a2 for `a{0..2}` and `a{0,1,2}`, several braces as their product; leading
    zeros stay. Raises DataError for more than MAX_PATHS of them."""
    too_many = DataError(f"{pattern[:200]}: stands for more than {MAX_PATHS:,} files")
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    choices = match[1].split(",")
    bounds = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if bounds:
        # As in a shell, {08..10} keeps its zeros and {8..10} has none.
        has_zeros = any(bound.startswith("0") and len(bound) > 1 for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if has_zeros else 0
        first, last = int(bounds[1]), int(bounds[2])
        if abs(last - first) >= MAX_PATHS:
            raise too_many
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    paths = []
    for choice in choices:
        paths += expand_braces(f"{before}{choice}{after}")
        if len(paths) > MAX_PATHS:
            raise too_many
    return paths


def fingerprint(files: Sequence[Path]) -> str:
    """Return a fingerprint of the content of some files.

    Up to 1 GB in all it is the SHA-256 of the content, as hex; of more files than one, `files:` and
    the SHA-256 of their digests in order. Above, it is `ends:` and the SHA-256 of each file's size
    and its first and last bytes (16 MB each of one file, divided among more, at least 64 kB).

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        sizes = [file.stat().st_size for file in files]
        if sum(sizes) > MAX_HASHED:
            return f"ends:{hash_of_ends(files, sizes)}"
        digests = [sha256(file) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    if len(digests) == 1:
        return digests[0]
    return f"files:{hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def hash_of_ends(files: Sequence[Path], sizes: Sequence[int]) -> str:
    """Return the SHA-256 of the sizes and the ends of files, in hexadecimal."""
    end_bytes = max(MIN_END_BYTES, END_BYTES // len(files))
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        with file.open("rb") as stream:
            # With the size, by which a file shows that was cut or grew in the middle.
            digest.update(size.to_bytes(8, "little") + stream.read(end_bytes))
            stream.seek(max(0, size - end_bytes))
            digest.update(stream.read(end_bytes))
    return digest.hexdigest()


# Bytes of one record of text: parsed JSON takes up to 30 times its size in memory, so a longer one
# is refused unread.
MAX_RECORD = 2**24


def check_record(size: int, name: str, limit: int = MAX_RECORD) -> None:
    """Raise DataError that begins with `name` for a record of more than `limit` bytes."""
    if size > limit:
        raise DataError(
            f"{name} has {size:,} bytes, over the limit of {limit:,} for one record; split it, or "
            "leave it out"
        )


def check_distinct(columns: Sequence[str], file: Path) -> None:
    """Raise DataError for columns of a table several of which have the same name."""
    for column, count in Counter(columns).items():
        if count > 1:
            raise DataError(f"{file} has {count} columns {column!r}, expected one of each name")


def json_reason(error: Exception) -> str:
    """Return why a text is not JSON, from the error of parsing it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def decoded(raw: bytes, where: str) -> str:
    """Return UTF-8, with or without a byte order mark, as a text. Raises DataError that begins with
    `where`."""
    try:
        # Editors on Windows begin a file with a byte order mark, which json refuses.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error


def parse_json(raw: bytes, where: str) -> Any:
    """Return the value of a JSON text. Raises DataError that begins with `where`."""
    text = decoded(raw, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {json_reason(error)}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file with an indentation of two, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


# Bytes of a config.yaml or config.json.
MAX_CONFIG = 2**20


def read_text(file: Path, limit: int) -> str:
    """Return the content of a text file.

    Raises DataError for one that is missing, larger than `limit` bytes, or not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            # One byte more than allowed shows that there is more, whatever the file's size says.
            raw = stream.read(limit + 1)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if len(raw) > limit:
        raise DataError(f"{file}: more than {limit:,} bytes, the limit for such a file")
    return decoded(raw, str(file))


# Bytes of a JSON file, which is parsed whole.
MAX_JSON = 2**30


def read_json(file: Path, kind: type = dict, limit: int = MAX_JSON) -> Any:
    """Return the content of a JSON file that holds a `kind`.

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
        raise DataError(f"{file}: holds a {type(content).__name__}, expected {KIND_NAMES[kind]}")
    return content


def read_json_if_there(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, and an empty one where `read_json` raises."""
    try:
        return read_json(file)
    except DataError:
        return {}


def files_of(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint by their paths in its folder, `.` where it is one file."""
    if path.is_file():
        return {".": path}
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(path))] = file
    return files


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


KIND_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
}
