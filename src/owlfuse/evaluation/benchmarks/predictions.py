"""predictions.jsonl: what was answered, appended as batches end, so that an evaluation that was
stopped goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_write

NAME = "predictions.jsonl"


class Predictions:
    """The predictions of a folder. Each line is an object with `settings`, the key of the settings
    that made it, and `id`, the question's. The first rank appends to predictions.jsonl, every other
    to a file of its own, and `finish` joins them.

    Args:
        key: of the settings; lines of other settings are left alone.

    Raises:
        DataError: a folder that cannot be made.
    """

    def __init__(self, folder: Path, key: str, rank: int = 0) -> None:
        self.folder = folder
        self.key = key
        self.path = folder / NAME if rank == 0 else folder / f"predictions.rank{rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}; name another folder: out=DIR") from error

    def files(self) -> list[Path]:
        """Of all ranks of this and earlier runs, the first rank's first."""
        return [
            file
            for file in [self.folder / NAME, *sorted(self.folder.glob("predictions.rank*.jsonl"))]
            if file.exists()
        ]

    def read(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """The predictions of these settings by their ids, an answer before a skip, and the lines of
        others.

        A line that was cut as the power went is left out. Raises DataError for a file that holds
        something else.
        """
        mine: dict[str, dict[str, Any]] = {}
        others: list[str] = []
        for file in self.files():
            for number, text in enumerate(
                file.read_text(encoding="utf-8", errors="replace").split("\n"), 1
            ):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                    found = (line["settings"], line["id"])
                except ValueError:
                    continue
                except (KeyError, TypeError):
                    raise DataError(
                        f"{file}: line {number} is no prediction of ours; name another folder: "
                        "out=DIR"
                    ) from None
                if found[0] != self.key:
                    others.append(text)
                elif "skipped" not in line or found[1] not in mine:
                    mine[found[1]] = line
        return mine, others

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds predictions, on the disk when this returns."""
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # of a line that was cut
                    file.write(b"\n")
            file.write(b"".join(self.encoded(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def encoded(self, line: dict[str, Any]) -> bytes:
        """A line of the file."""
        return (
            json.dumps({"settings": self.key, **line}, ensure_ascii=False).encode(
                "utf-8", "replace"
            )
            + b"\n"
        )

    def finish(self, lines: list[dict[str, Any]], others: list[str]) -> None:
        """Writes predictions.jsonl anew, these lines last and in their order, and takes the
        other ranks' files away."""
        parts = self.files()[1:]
        with atomic_write(self.folder / NAME, "wb") as file:
            file.writelines(text.encode("utf-8", "replace") + b"\n" for text in others)
            file.writelines(
                self.encoded({k: v for k, v in line.items() if k != "settings"}) for line in lines
            )
        for part in parts:
            part.unlink()
