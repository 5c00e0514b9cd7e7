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
        key: of the settings; lines of other settings stay in the file.

    Raises:
        DataError: a folder that cannot be made.
    """

    def __init__(self, folder: Path, key: str, rank: int = 0) -> None:
        self.folder = folder
        self.key = key
        self.stale: set[tuple[str, str | None]] = set()
        """Ids and hashes of questions that have changed since they were answered."""
        self.path = folder / NAME if rank == 0 else folder / f"predictions.rank{rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}; name another folder: out=DIR") from error

    def files(self) -> list[Path]:
        """Returns the files of all ranks of this and earlier runs, the first rank's first."""
        files = [self.folder / NAME, *sorted(self.folder.glob("predictions.rank*.jsonl"))]
        return [file for file in files if file.exists()]

    def read(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Returns the predictions of these settings by their ids, an answer before a skip and
        without the `stale` ones, and the lines of other settings.

        A line that was cut as the power went is left out. Raises DataError for a file that holds
        something else.
        """
        predictions: dict[str, dict[str, Any]] = {}
        other_settings: list[str] = []
        for file in self.files():
            # by line feeds alone: an answer may hold the other characters that end a line
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            for number, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                    settings, identity = line["settings"], line["id"]
                except ValueError:
                    continue
                except (KeyError, TypeError):
                    raise DataError(
                        f"{file}: line {number} is no prediction of ours; name another folder: "
                        "out=DIR"
                    ) from None
                if settings != self.key:
                    other_settings.append(text)
                elif (identity, line.get("question")) in self.stale:
                    continue
                elif "skipped" not in line or identity not in predictions:
                    predictions[identity] = line
        return predictions, other_settings

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds predictions, on the disk when this returns."""
        with self.path.open("a+b") as file:
            # in append mode the position of reading is not the end
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # of a line that was cut
                    file.write(b"\n")
            file.write(b"".join(self.encoded(line) for line in lines))
            file.flush()
            # an answer may have taken minutes: it is not to be lost by a crash of the machine
            os.fsync(file.fileno())

    def encoded(self, line: dict[str, Any]) -> bytes:
        """Returns a line of the file."""
        text = json.dumps({"settings": self.key, **line}, ensure_ascii=False)
        # an answer may hold half a surrogate pair, which is no UTF-8
        return text.encode("utf-8", "replace") + b"\n"

    def finish(self, lines: list[dict[str, Any]], other_settings: list[str]) -> None:
        """Writes predictions.jsonl anew, these lines last and in their order, and deletes the
        other ranks' files."""
        rank_files = self.files()[1:]
        with atomic_write(self.folder / NAME, "wb") as file:
            for text in other_settings:
                file.write(text.encode("utf-8", "replace") + b"\n")
            for line in lines:
                file.write(self.encoded(line))
        # only now: until the joined file is there, these have the only copy of their answers
        for rank_file in rank_files:
            rank_file.unlink()
