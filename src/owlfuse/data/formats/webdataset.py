"""WebDataset shards: tars whose members of one sample share a name, `000001.jpg` with
`000001.json` or `000001.txt`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from owlfuse.core.errors import DataError
from owlfuse.core.files import decoded, json_reason
from owlfuse.core.types import Note, Sample
from owlfuse.data.formats.base import VideoSource
from owlfuse.data.formats.records import (
    IMAGES,
    TOOLS,
    VIDEOS,
    check_rest,
    has_chat,
    read_chat,
    system_turn,
)
from owlfuse.data.formats.turn_keys import SYSTEM_KEYS, is_absent
from owlfuse.data.formats.turns import caption_messages, pictures_of, videos_of
from owlfuse.data.readers.tars import TarSamples

PICTURES = ("jpg", "jpeg", "png", "webp")
CLIPS = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "gif")
SOUNDS = ("mp3", "wav", "flac", "ogg", "opus", "m4a", "aac")


@dataclass(eq=False)
class WebDataset(VideoSource):
    """Samples of tar shards, uncompressed. Opening reads the headers once; then any sample is
    reached at once, so that the shards mix, shuffle, repeat and resume as every other source does,
    over any ranks and workers.

    A sample has pictures (`.jpg`, `.jpeg`, `.png`, `.webp`; several as `.0.jpg`, `.1.jpg`, in the
    order of their names) or videos (`.mp4`, `.mkv`, `.webm`, `.avi`, `.mov`, ...), and

    - `.json` with a chat as `records` tells, whose other fields are kept as metadata; or
    - `.txt`, or `.json` with a text under `caption`: a caption. Where both are there, the `.txt`,
      as img2dataset has it.

    Args:
        file: a path, a glob (`train-*.tar`) or braces (`train-{0000..0127}.tar`).
        instructions: one of them is put to the pictures of a caption, chosen by a hash of the
            sample's name.
        index_dir: where the samples' offsets are kept, so that the headers are not read again at
            the next opening.
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

    def place(self, index: int) -> str:
        """See `Source`; of a shard, whose samples are counted from 1."""
        shards = cast("TarSamples", self.records)
        shard = int(np.searchsorted(shards.first, index, side="right")) - 1
        return f"sample {index - int(shards.first[shard]) + 1} of {shards.files[shard].name}"

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        members = Members(record, name)
        facts = parsed(record[members.json], name) if members.json else {}
        images, videos, notes = members.shown(facts, name)
        if has_chat(facts):
            if members.text:
                notes.append(Note("unused", f"a member .{members.text} beside a chat"))
            rest = {key: value for key, value in facts.items() if key not in (*IMAGES, *VIDEOS)}
            sample = read_chat(rest, name, self.name, "conversations", images, videos)
            sample.notes += notes
            return sample
        return self.caption(record, members, facts, images, videos, notes, name)

    def caption(
        self,
        record: dict[str, Any],
        members: Members,
        facts: dict[str, Any],
        images: list[str | bytes],
        videos: list[str | bytes],
        notes: list[Note],
        name: str,
    ) -> Sample:
        """A sample with a caption. Raises DataError."""
        caption = facts.get("caption")
        if members.text:
            if caption is not None:
                notes.append(Note("unused", "the caption of a .json beside a .txt"))
            caption = decoded(record[members.text], f"sample {name}: its .{members.text}").strip()
        if not (images or videos) or caption is None:
            there = ", ".join(f".{key}" for key in record if key != "id")
            raise DataError(
                f"sample {name} has {there}, expected a picture (.jpg, .png, .webp) or a video "
                "(.mp4, ...) with .txt, or .json "
                "with conversations, messages or caption"
            )
        members.check_numbered(name)
        messages = caption_messages(
            len(images), caption, self.instructions or [], record["id"], name, len(videos)
        )
        for turn in system_turn(facts, name, []):
            messages.insert(
                0, {"role": "system", "content": [{"type": "text", "text": turn["content"]}]}
            )
        left_out = ("id", "caption", *SYSTEM_KEYS, *IMAGES, *VIDEOS)
        metadata = {key: value for key, value in facts.items() if key not in left_out}
        for key in ("question", "prompt", "query", *TOOLS):
            if not is_absent(metadata.get(key)):
                raise DataError(
                    f"sample {name}: its .json has '{key}' and no answer, and a caption answers "
                    "none"
                )
        shown = {"image": images, "video": videos}
        notes += check_rest({**metadata, **shown}, name, set(metadata))
        return Sample(name, self.name, messages, images, metadata, videos, notes=notes)


class Members:
    """Which of a sample's members is what.

    Attributes:
        pictures, clips: the names (`0.jpg`) of its pictures and videos, in their order.
        json, text: the names of its .json and its .txt, "" where it has none.

    Raises:
        DataError: sound, an empty picture or video, or several .json or .txt.
    """

    def __init__(self, record: dict[str, Any], name: str) -> None:
        kinds: dict[str, list[str]] = {}
        for key in sorted(record.keys() - {"id"}, key=natural):
            kinds.setdefault(key.rsplit(".", 1)[-1], []).append(key)
        self.record = record
        self.pictures = sorted(
            (key for kind in PICTURES for key in kinds.pop(kind, [])), key=natural
        )
        self.clips = sorted((key for kind in CLIPS for key in kinds.pop(kind, [])), key=natural)
        self.json = only(kinds.pop("json", []), "json", name)
        self.text = only(kinds.pop("txt", []), "txt", name)
        for kind in SOUNDS:
            if kind in kinds:
                raise DataError(
                    f"sample {name} has .{kinds[kind][0]}, sound, which no model here hears"
                )
        for key, kind in [(key, "picture") for key in self.pictures] + [
            (key, "video") for key in self.clips
        ]:
            if not record[key]:
                raise DataError(f"sample {name} has a {kind} of 0 bytes")
        self.others = [key for keys in kinds.values() for key in keys]

    def shown(
        self, facts: dict[str, Any], name: str
    ) -> tuple[list[str | bytes], list[str | bytes], list[Note]]:
        """Pictures and videos: the members, or where there are none, those that the .json names
        below the image root; and notes of what is not used. Raises DataError where members and
        names are not as many."""
        notes = [Note("unused", f"a member .{key}") for key in self.others]
        files: dict[str, list[str | bytes]] = {}
        for what, keys, members in (
            ("picture", IMAGES, self.pictures),
            ("video", VIDEOS, self.clips),
        ):
            named = [key for key in keys if not is_absent(facts.get(key))]
            if not members or not named:
                files[what] = [self.record[key] for key in members]
                if named:
                    files[what] = (
                        pictures_of(facts, name) if what == "picture" else videos_of(facts, name)
                    )
                continue
            value = facts[named[0]]
            count = len(value) if isinstance(value, list) else 1
            if count != len(members):
                shown = ", ".join(f".{key}" for key in members)
                raise DataError(
                    f"sample {name} has the {what}s {shown}, and its .json names {count} in "
                    f"'{named[0]}'"
                )
            files[what] = [self.record[key] for key in members]
            notes.append(Note("unused", f"a .json's '{named[0]}' beside the members that it names"))
        return files["picture"], files["video"], notes

    def check_numbered(self, name: str) -> None:
        """Raises DataError for several pictures or videos of one caption that are not numbered:
        a mask, for instance."""
        for keys in (self.pictures, self.clips):
            if len(keys) > 1 and not all(key.partition(".")[0].isdigit() for key in keys):
                shown = ", ".join(f".{key}" for key in keys)
                raise DataError(
                    f"sample {name} has {shown} and one caption, expected one of them, or "
                    "numbers: .0.jpg, .1.jpg"
                )


def only(keys: list[str], kind: str, name: str) -> str:
    """The one member of a kind, or "". Raises DataError for several."""
    if len(keys) > 1:
        raise DataError(
            f"sample {name} has {', '.join(f'.{key}' for key in keys)}, expected one .{kind}"
        )
    return keys[0] if keys else ""


def parsed(raw: bytes, name: str) -> dict[str, Any]:
    """A .json member. Raises DataError."""
    try:
        facts = json.loads(decoded(raw, f"sample {name}: its .json"))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"sample {name}: its .json is not JSON: {json_reason(error)}") from error
    if not isinstance(facts, dict):
        raise DataError(
            f"sample {name}: its .json holds a {type(facts).__name__}, expected an object"
        )
    return facts


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key by which 2.jpg stands before 10.jpg."""
    return [
        (piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in name.split(".")
    ]
