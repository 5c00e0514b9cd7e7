"""What every source has: where it lies, its share of the mixture, and what happens to a sample that is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from owlfuse.data.video import VideoSampling
from owlfuse.types import DataError, Sample

IMAGE = "<image>"
VIDEO = "<video>"


class Source:
    """A file of records, each a chat. Subclasses read a record in `sample`.

    Args:
        file: JSON (a list of records) or JSONL (a record a line), UTF-8.
        image_root: the folder that image paths start from and cannot leave; by default the file's own.
        weight: the share of the mixture, relative to the other sources'.
        on_error: what a wrong sample does: `error` stops, `skip` leaves it out and counts it.
        max_skips: with `skip`, how many are left out before it is an error all the same.
        tile: the share of samples, 0 to 1, whose pictures become a global view and tiles (see `tiles`).
        video: how frames of videos are chosen, the keys of a `VideoSampling`; by default as `ChatData` says.

    Raises:
        DataError: a `tile` or `video` that is none of those; at first use, a file that is missing, is not valid, or holds
            no record.
    """

    def __init__(
        self,
        file: str,
        image_root: str | None = None,
        weight: float = 1.0,
        on_error: Literal["error", "skip"] = "error",
        max_skips: int = 100,
        tile: float = 0.0,
        video: VideoSampling | dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= tile <= 1:
            raise DataError(f"{file}: tile is {tile}, expected a share from 0 to 1")
        self.tile = tile
        try:
            self.video = None if video is None else VideoSampling.of(video)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        self.file = Path(file).expanduser()
        self.image_root = Path(image_root).expanduser() if image_root else self.file.parent
        self.weight = weight
        self.on_error = on_error
        self.max_skips = max_skips
        self.name = self.file.stem

    @cached_property
    def records(self) -> list[Any]:
        """The file's records, read at first use: data that are made on the spot exist by then."""
        return read_records(self.file)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`. Raises DataError, naming source and sample, where the record is not what it should be."""
        return self.read(index)

    def read(self, index: int) -> Sample:
        """The record at `index` as a sample."""
        record = self.records[index]
        if not isinstance(record, dict):
            raise DataError(f"{self.name}: record {index} of {self.file} is a {type(record).__name__}, expected an object")
        return self.sample(record, f"{self.name}:{record.get('id', index)}")

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """The record as a sample called `name`."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")

    def fingerprint(self) -> str:
        """SHA-256 of the file, as `mixture.json` keeps it."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_records(file: Path) -> list[Any]:
    """The records of a JSON or JSONL file."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    records = read_lines(file, text) if file.suffix == ".jsonl" else read_json(file, text)
    if not isinstance(records, list):
        raise DataError(f"{file}: holds a {type(records).__name__}, expected a list of records")
    if not records:
        raise DataError(f"{file}: holds no record")
    return records


def read_json(file: Path, text: str) -> Any:
    """The one JSON value of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: not JSON: {error.msg}") from error


def read_lines(file: Path, text: str) -> list[Any]:
    """One JSON value a line, empty lines left out."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}: line {number}: not JSON: {error.msg}") from error
    return records


def parts_of(text: str, videos: bool = False) -> list[dict[str, str]]:
    """Text with `<image>` placeholders -> text and image parts, every other character kept; with `videos`, `<video>`
    placeholders become video parts too."""
    kinds = {IMAGE: "image", VIDEO: "video"} if videos else {IMAGE: "image"}
    parts: list[dict[str, str]] = []
    for piece in re.split(f"({'|'.join(kinds)})", text):
        if piece:
            parts.append({"type": kinds[piece]} if piece in kinds else {"type": "text", "text": piece})
    return parts


def field(record: dict[str, Any], key: str, kind: type, name: str) -> Any:
    """A record's field, of the kind that it must have."""
    if key not in record:
        raise DataError(f"sample {name} has no '{key}'; it has {', '.join(sorted(record)) or 'nothing'}")
    if not isinstance(record[key], kind):
        raise DataError(f"sample {name}: '{key}' is a {type(record[key]).__name__}, expected {kind.__name__}")
    return record[key]
