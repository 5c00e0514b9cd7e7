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

MAX_AGE_SECONDS = 3600
"""How long an upload waits for its question."""


def check_uploaded(path: str | Path, folder: Path) -> Path:
    """Return the file.

    Raises DataError where it does not lie below the folder of uploads, as no honest page asks.
    """
    file = Path(os.path.realpath(path))  # a link may lead out of the folder
    is_below = file.is_relative_to(os.path.realpath(folder))
    if "://" in str(path) or not is_below or not file.is_file():
        raise DataError(f"{Path(path).name} is not here any more; add it again")
    return file


def uploads_only(page: Any, folder: Path) -> None:
    """Makes a page of Gradio's take files from the folder of uploads alone.

    What a browser sends as a file is a path, and before any handler sees it Gradio copies it into
    the folder, or fetches it if it is an address of the web. Gradio 6.31 checks the path only on
    pages that `launch` started, which the two flags say.
    """
    page.has_launched = page.is_running = True

    async def move_upload(path: str | Path | None) -> str | None:
        return None if path is None else str(check_uploaded(path, folder))

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = move_upload


def files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yields every file below a folder, but for those that vanish meanwhile."""
    # Gradio puts every upload into a folder named by its hash.
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):
                yield path, os.stat(path)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(stat.st_size for _, stat in files_below(folder))


def remove(paths: Iterable[str], folder: Path) -> None:
    """Removes uploads that are in memory by now; a path beyond the folder is left alone."""
    for path in paths:
        # It may be removed already, by the handler of another page.
        with contextlib.suppress(OSError, DataError):
            check_uploaded(path, folder).unlink()


def remove_old(folder: Path) -> None:
    """Removes uploads that nobody asked about for an hour."""
    oldest = time.time() - MAX_AGE_SECONDS
    remove([path for path, stat in files_below(folder) if stat.st_mtime < oldest], folder)
