"""WebDataset shards: tars whose members of one sample share a name, `000001.jpg` with `000001.json` or `000001.txt`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from owlfuse.data.formats.base import VideoSource
from owlfuse.data.lines import decoded, json_reason
from owlfuse.data.tars import TarSamples
from owlfuse.data.turn_keys import tools_of
from owlfuse.data.turns import caption_messages, chat
from owlfuse.types import DataError, Sample

PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass(eq=False)
class WebDataset(VideoSource):
    """Samples of tar shards, uncompressed. Opening reads the headers once; then any sample is reached at once, so that the
    shards mix, shuffle, repeat and resume as every other source does, over any ranks and workers.

    A sample has pictures (`.jpg`, `.jpeg`, `.png`, `.webp`; several as `.0.jpg`, `.1.jpg`, in the order of their names), and
    - `.json` with a chat under `conversations` or `messages` (see `turns.chat`), whose other fields are kept as metadata; or
    - `.txt`, or `.json` with a text under `caption`: a caption.

    Args:
        file: a path, a glob (`train-*.tar`) or braces (`train-{0000..0127}.tar`).
        instructions: one of them is put to the pictures of a caption, chosen by a hash of the sample's name.
        index_dir: where the samples' offsets are kept, so that the headers are not read again at the next opening.
        others: see `Source`.
    """

    instructions: list[str] | None = None
    index_dir: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.index_dir = Path(self.index_dir).expanduser() if self.index_dir else None

    def open(self) -> Sequence[Any]:
        """See `Source`."""
        return TarSamples(self.files(), self.index_dir)

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """See `Source`; no content is read."""
        for index in indices:
            with suppress(DataError):
                yield index, cast("TarSamples", self.records).key(index)

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        pictures = [record[key] for key in sorted(record, key=natural) if key.rsplit(".", 1)[-1] in PICTURES]
        if any(not picture for picture in pictures):
            raise DataError(f"sample {name} has a picture of 0 bytes")
        facts = parsed(record["json"], name) if "json" in record else {}
        turns = facts.get("conversations", facts.get("messages"))
        metadata = {key: value for key, value in facts.items() if key not in ("conversations", "messages", "caption")}
        if turns is not None:
            if not isinstance(turns, list):
                raise DataError(f"sample {name}: the chat of its .json is a {type(turns).__name__}, expected a list of turns")
            messages, images, videos = chat(turns, pictures, name)
            return Sample(name, self.name, messages, images, metadata, videos, tools_of(facts, name))
        caption = decoded(record["txt"], f"sample {name}: its .txt").strip() if "txt" in record else facts.get("caption")
        if not pictures or caption is None:
            raise DataError(
                f"sample {name} has {', '.join(f'.{key}' for key in record if key != 'id')}, expected a picture (.jpg, .png, "
                ".webp) with .txt, or .json with conversations, messages or caption"
            )
        messages = caption_messages(len(pictures), caption, self.instructions or [], record["id"], name)
        return Sample(name, self.name, messages, pictures, metadata)


def parsed(raw: bytes, name: str) -> dict[str, Any]:
    """A .json member. Raises DataError."""
    try:
        facts = json.loads(decoded(raw, f"sample {name}: its .json"))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"sample {name}: its .json is not JSON: {json_reason(error)}") from error
    if not isinstance(facts, dict):
        raise DataError(f"sample {name}: its .json holds a {type(facts).__name__}, expected an object")
    return facts


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key by which 2.jpg stands before 10.jpg."""
    return [(piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in name.split(".")]
