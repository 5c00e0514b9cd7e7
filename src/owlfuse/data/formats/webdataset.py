"""WebDataset shards: tars whose members of one sample share a name, `000001.jpg` with
`000001.json` or `000001.txt`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from owlfuse.core.errors import DataError
from owlfuse.core.files import decoded, parse_json
from owlfuse.core.types import JsonObject, Media, Note, Sample, without_keys
from owlfuse.data.formats.base import VideoSource
from owlfuse.data.formats.records import (
    TOOLS,
    caption_messages,
    check_unused,
    has_chat,
    question_metadata,
    read_chat,
)
from owlfuse.data.formats.turn_keys import IMAGES, SYSTEM_KEYS, VIDEOS, present_keys
from owlfuse.data.formats.turns import files_of
from owlfuse.data.readers.tars import TarSamples

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm")
# Pictures of formats that are not decoded (see `images.FORMATS`).
UNREAD_PICTURES = ("heic", "heif", "jxl", "tga", "psd", "svg", "qoi", "exr")
CLIPS = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "gif")
SOUNDS = ("mp3", "wav", "flac", "ogg", "opus", "m4a", "aac")


@dataclass(eq=False)
class WebDataset(VideoSource):
    """Samples of tar shards, uncompressed. Opening reads the headers once; then any sample is
    reached at once, so that the shards mix, shuffle, repeat and resume as every other source does,
    over any ranks and workers.

    A sample has pictures (`.jpg`, `.png`, `.webp`, `.bmp`, `.tif`, `.avif`, ...; several as
    `.0.jpg`, `.1.jpg`, in the order of their names) or videos (`.mp4`, `.mkv`, `.webm`, `.avi`,
    `.mov`, ...), and

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

    def location(self, index: int) -> str:
        """See `Source`; of a shard, whose samples are counted from 1."""
        shards = cast("TarSamples", self.records)
        shard = shards.shard_of(index)
        return f"sample {index - int(shards.first[shard]) + 1} of {shards.files[shard].name}"

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        members = Members(record, name)
        if not has_chat(members.fields):
            return self.caption(members, name)
        if members.text:
            members.notes.append(Note("unused", f"a member .{members.text} beside a chat"))
        # The members are the pictures: what names them in the .json has been compared.
        chat = without_keys(members.fields, (*IMAGES, *VIDEOS))
        sample = read_chat(chat, name, self.name, "conversations", members.images, members.videos)
        sample.notes += members.notes
        return sample

    def caption(self, members: Members, name: str) -> Sample:
        """Return a sample with a caption. Raises DataError."""
        record, fields, notes = members.record, members.fields, members.notes
        images, videos = members.images, members.videos
        caption = fields.get("caption")
        if members.text:
            if caption is not None:
                notes.append(Note("unused", "the caption of a .json beside a .txt"))
            # img2dataset ends captions with a line break, which is none of the caption's.
            caption = decoded(record[members.text], f"sample {name}: its .{members.text}").strip()
        if not (images or videos) or caption is None:
            extensions = ", ".join(f".{key}" for key in record if key != "id")
            raise DataError(
                f"sample {name} has {extensions}, expected a picture (.jpg, .png, .webp) or a "
                "video (.mp4, ...) with .txt, or .json with conversations, messages or caption"
            )
        members.check_numbered(name)
        messages = caption_messages(
            fields, name, caption, self.instructions, record["id"], len(images), len(videos)
        )
        metadata = without_keys(fields, ("id", "caption", *SYSTEM_KEYS, *IMAGES, *VIDEOS))
        for key in present_keys(metadata, ("question", "prompt", "query", *TOOLS)):
            raise DataError(
                f"sample {name}: its .json has '{key}' and no answer, and a caption answers none"
            )
        notes += check_unused(metadata, name, {"image": images, "video": videos})
        metadata = question_metadata(metadata, messages, name)
        return Sample(name, self.name, messages, images, metadata, videos, notes=notes)


class Members:
    """The members of a sample by what they hold.

    Attributes:
        pictures, clips: the names (`0.jpg`) of its pictures and videos, in their order.
        text: the name of its .txt, "" where it has none.
        fields: what its .json holds, nothing where it has none.
        images, videos: the members' contents, or where there are none, the files that the .json
            names below the image root.
        notes: of what is not used.

    Raises:
        DataError: sound, a picture that is not decoded, an empty picture or video, several .json or
            .txt, a .json that is no object or names another number of pictures or videos than
            there are.
    """

    def __init__(self, record: JsonObject, name: str) -> None:
        self.record = record
        self.pictures: list[str] = []
        self.clips: list[str] = []
        json_names: list[str] = []
        text_names: list[str] = []
        others: list[str] = []
        lists = {"json": json_names, "txt": text_names}
        lists |= dict.fromkeys(PICTURES, self.pictures) | dict.fromkeys(CLIPS, self.clips)
        for key in sorted(record.keys() - {"id"}, key=natural):
            extension = key.rsplit(".", 1)[-1]
            if extension in SOUNDS:
                raise DataError(f"sample {name} has .{key}, sound, which no model here hears")
            if extension in UNREAD_PICTURES:
                raise DataError(
                    f"sample {name} has .{key}, a picture that is not decoded; expected one of "
                    f"{', '.join(PICTURES)}"
                )
            # By the last extension, so that `seg.png` is a picture like `png`.
            lists.get(extension, others).append(key)
        json_name = single_name(json_names, "json", name)
        self.text = single_name(text_names, "txt", name)
        for kind, keys in (("picture", self.pictures), ("video", self.clips)):
            if not all(record[key] for key in keys):
                raise DataError(f"sample {name} has a {kind} of 0 bytes")
        fields: Any = {}
        if json_name:
            fields = parse_json(record[json_name], f"sample {name}: its .json")
        if not isinstance(fields, dict):
            raise DataError(
                f"sample {name}: its .json holds a {type(fields).__name__}, expected an object"
            )
        self.fields: JsonObject = fields
        self.notes = [Note("unused", f"a member .{key}") for key in others]
        self.images = self.files(self.pictures, "picture", IMAGES, name)
        self.videos = self.files(self.clips, "video", VIDEOS, name)

    def files(self, members: list[str], kind: str, keys: tuple[str, str], name: str) -> list[Media]:
        """Return the contents of some members, or where there are none, the files that the .json
        names; notes that it names members too. Raises DataError."""
        if not members:
            return files_of(self.fields, keys, name)
        present = present_keys(self.fields, keys)
        extensions = ", ".join(f".{member}" for member in members)
        if len(members) > 1 and not present and not in_series(members):
            raise DataError(
                f"sample {name} has the {kind}s {extensions}, of which nothing tells the order, or "
                f"whether all are to be shown; name them under '{keys[1]}' of its .json, or number "
                "them: .0.jpg, .1.jpg"
            )
        if present:
            key = present[0]
            value = self.fields[key]
            count = len(value) if isinstance(value, list) else 1
            if count != len(members):
                raise DataError(
                    f"sample {name} has the {kind}s {extensions}, and its .json names {count} in "
                    f"'{key}'"
                )
            listed = in_order_of(members, value if isinstance(value, list) else [value])
            if listed is None and len(members) > 1 and not all(map(is_numbered, members)):
                raise DataError(
                    f"sample {name} has the {kind}s {extensions}, whose order its .json's '{key}' "
                    "does not tell: it names other files; name the members there, or number them: "
                    ".0.jpg, .1.jpg"
                )
            members = listed or members
            self.notes.append(Note("unused", f"a .json's '{key}' beside the members that it names"))
        return [self.record[member] for member in members]

    def check_numbered(self, name: str) -> None:
        """Raise DataError for several pictures or videos of one caption that are not numbered: a
        mask, for instance."""
        for keys in (self.pictures, self.clips):
            if len(keys) > 1 and not all(map(is_numbered, keys)):
                extensions = ", ".join(f".{key}" for key in keys)
                raise DataError(
                    f"sample {name} has {extensions} and one caption, expected one of them, or "
                    "numbers: .0.jpg, .1.jpg"
                )


def single_name(keys: list[str], extension: str, name: str) -> str:
    """Return the one member with an extension, or "". Raises DataError for several."""
    if len(keys) > 1:
        members = ", ".join(f".{key}" for key in keys)
        raise DataError(f"sample {name} has {members}, expected one .{extension}")
    return keys[0] if keys else ""


def is_numbered(member: str) -> bool:
    """Return whether a member's name is a number: 0.jpg."""
    return member.partition(".")[0].isdecimal()


def in_series(members: list[str]) -> bool:
    """Return whether members' names differ in their numbers alone: img1.jpg, img2.png."""
    stems = {re.sub(r"\d+", "#", member.rpartition(".")[0]) for member in members}
    return len(stems) == 1 and "#" in stems.pop()


def in_order_of(members: list[str], listed: list[Any]) -> list[str] | None:
    """Return the members in the order in which a list names them, by their whole names (with the
    sample's key) or without it; None where it names other files."""
    ordered = []
    for path in listed:
        file = path.rpartition("/")[2] if isinstance(path, str) else ""
        named = [m for m in members if file == m or file.endswith(f".{m}")]
        # `seg.png` ends with `png` too: the longest is meant
        ordered.append(max(named, key=len, default=""))
    return ordered if sorted(ordered) == sorted(members) else None


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which 2.jpg comes before 10.jpg, and img2.jpg before img10.jpg."""
    key = []
    for piece in re.findall(r"\d+|\D+", name):
        is_number = piece.isdecimal()
        # The flag comes first, so that numbers and names are not mixed.
        # Python refuses to read numbers of more digits.
        number = int(piece) if is_number and len(piece) < 4000 else 0
        key.append((is_number, number, piece))
    return key
