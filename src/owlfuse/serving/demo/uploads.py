"""The folder of uploaded files: nothing else is read for a visitor, and nothing stays in it for
long."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from owlfuse.core.errors import DataError

KEPT = 3600
"""Seconds that an upload waits for its question."""


def check_uploaded(path: str | Path, folder: Path) -> Path:
    """The file.

    Raises DataError where it does not lie below the folder of uploads, as no honest page asks.
    """
    place = Path(os.path.realpath(path))
    if (
        "://" in str(path)
        or not place.is_relative_to(os.path.realpath(folder))
        or not place.is_file()
    ):
        raise DataError(f"{Path(path).name} is not here any more; add it again")
    return place


def uploads_only(page: Any, folder: Path) -> None:
    """Makes a page of Gradio's take files from the folder of uploads alone.

    What a browser sends as a file is a path, and before any handler sees it Gradio copies it into
    the folder, or fetches it if it is an address of the web. Gradio 6.31 checks the path only on
    pages that `launch` started, which the two flags say.
    """
    page.has_launched = page.is_running = True

    async def moved(path: str | Path | None) -> str | None:
        return None if path is None else str(check_uploaded(path, folder))

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = moved


def files_of(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a folder; those that vanish meanwhile are passed over."""
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.path.join(place, name), os.stat(os.path.join(place, name))


def stored(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(facts.st_size for _, facts in files_of(folder))


def remove(paths: Iterable[str], folder: Path) -> None:
    """Removes uploads that are in memory by now; a path beyond the folder is left alone."""
    for path in paths:
        with contextlib.suppress(OSError, DataError):
            check_uploaded(path, folder).unlink()


def sweep(folder: Path) -> None:
    """Removes uploads that nobody asked about for an hour."""
    remove(
        [path for path, facts in files_of(folder) if facts.st_mtime < time.time() - KEPT], folder
    )
