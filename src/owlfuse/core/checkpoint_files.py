"""Checkpoints on disk: a file, or a folder of shards, which is complete or not there."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from owlfuse.core.files import files_of, sync

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What zipfile raises for a damaged file, by what a flipped bit makes of it: another compression,
an encryption, a name that is no text, an offset behind the end."""

MANIFEST = "manifest.json"
"""The bytes of every other file of a folder of shards; written last."""


def partial_path(path: Path) -> Path:
    """Where a checkpoint is written before it is renamed."""
    return path.with_name(path.name + ".part")


def commit_checkpoint(path: Path) -> None:
    """Renames `partial_path(path)` to `path` when it is on the disk.

    A file replaces another in one step. Of two folders the earlier is renamed away first.
    """
    part = partial_path(path)
    if part.is_dir():
        sizes = {name: {"bytes": file.stat().st_size} for name, file in files_of(part).items()}
        (part / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    for file in files_of(part).values():
        sync(file)
    # The names in a folder are written apart from the files.
    sync(part)
    replaced = path.with_name(path.name + ".old.part")
    if path.exists() and (path.is_dir() or part.is_dir()):
        # What a process left that was killed between the two renamings.
        remove_checkpoint(replaced)
        path.rename(replaced)
    part.replace(path)
    remove_checkpoint(replaced)
    # Else the rename itself could be lost with the power.
    sync(path.parent)


def find_checkpoint_error(path: Path) -> str | None:
    """Says why a checkpoint is not complete, or None. Reads sizes and the end of a file, not its
    contents."""
    if path.is_file():
        # A zip file's table of contents comes last, so a file without its end has none.
        try:
            is_complete = zipfile.is_zipfile(path)
        except ZIP_ERRORS:
            is_complete = False
        return None if is_complete else "is truncated or no checkpoint"
    manifest = path / MANIFEST
    if not manifest.exists():
        manifest = path.with_suffix(".json")  # of runs until November 2026, beside the folder
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"has no {MANIFEST} that can be read"
    files = files_of(path)
    for name, size in sizes.items():
        if name not in files:
            return f"lacks {name}"
        if (present := files[name].stat().st_size) != size:
            return f"is damaged: {name} has {present} bytes of {size}"
    return None


def find_damage(path: Path) -> str | None:
    """Says which record of a checkpoint's file is not as it was written, or None.

    torch writes a CRC32 with each record and does not look at it again, so a flipped byte would go
    into the weights. Reads the whole file: for the process that is about to load it.
    """
    if path.is_dir():
        return None  # each rank checks the parts that it loads (parallel.checkpoints.SafeReader)
    with path.open("rb") as file:
        record = find_damaged_record(file)
    return None if record is None else f"is damaged: {record} differs from its checksum"


def find_damaged_record(file: IO[bytes]) -> str | None:
    """Returns the name of the first record of a file of torch's that differs from its CRC32, or
    words for its table of contents, which has none."""
    try:
        with zipfile.ZipFile(file) as records:
            return records.testzip()
    except ZIP_ERRORS:
        return "its table of contents"


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if path.name.startswith("step_") and path.suffix == ".ckpt":
        # what runs until November 2026 have beside it
        path.with_suffix(".json").unlink(missing_ok=True)
        path.with_suffix(".csv").unlink(missing_ok=True)
