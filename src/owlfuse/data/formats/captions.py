"""Caption pairs, `{"id", "image", "caption"}`: JSON, JSONL, CSV or TSV with a header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import JsonObject, Sample, without_keys
from owlfuse.data.formats.base import PictureSource, field
from owlfuse.data.formats.records import (
    CHATS,
    TOOLS,
    caption_messages,
    check_unused,
    question_metadata,
)
from owlfuse.data.formats.turn_keys import IMAGES, SYSTEM_KEYS, VIDEOS, brief, present_keys
from owlfuse.data.formats.turns import picture_of
from owlfuse.data.readers.text_table import TextTable


@dataclass(eq=False)
class Captions(PictureSource):
    """Pictures with captions. The user shows the picture, with an instruction if there are some.

    A CSV or TSV has a header line and is found row by row, as JSONL is. In CSV a field in double
    quotes may hold commas and newlines, `""` being a quote; in TSV a row is a line.

    Args:
        image_field: the field, or column, of the picture: a path below the image root, or a data:
            URI.
        caption_field: the field, or column, of the caption.
        instructions: one of them is put to each picture, chosen by a hash of the sample's id (its
            place where it has none).
        others: see `Source`.
    """

    image_field: str = "image"
    caption_field: str = "caption"
    instructions: list[str] | None = None

    def open(self) -> Sequence[Any]:
        """See `Source`."""
        if self.file.suffix not in (".csv", ".tsv"):
            return super().open()
        # A TSV has no quoting rule; csv.reader would join lines at a lone quote.
        is_tsv = self.file.suffix == ".tsv"
        rows = TextTable(self.file, "\t" if is_tsv else ",", quoted=not is_tsv)
        for column in (self.image_field, self.caption_field):
            if column not in rows.header:
                raise DataError(
                    f"{self.file} has no column {column!r}; its header has {', '.join(rows.header)}"
                )
        return rows

    def location(self, index: int) -> str:
        """See `Source`."""
        if isinstance(self.records, TextTable):
            return f"line {self.records.lines.number(index + 1)} of {self.file.name}"
        return super().location(index)

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        caption = field(record, self.caption_field, str, name)
        picture = field(record, self.image_field, object, name)
        image = picture_of(picture, name, self.image_field)
        # without the source's name, so that another name changes no instruction
        identity = name.removeprefix(f"{self.name}:")
        used = {"id", self.image_field, self.caption_field, *SYSTEM_KEYS}
        metadata = without_keys(record, used)
        for key in present_keys(metadata, CHAT_KEYS):
            raise DataError(
                f"sample {name} has '{key}': {brief(metadata[key])}, which is no part of a "
                "caption; expected the format llava or messages, or a file without it"
            )
        unused = without_keys(metadata, IMAGES)
        # The picture is there for the check alone: a key such as `photo` is no second one.
        notes = check_unused(unused, name, {"image": image})
        messages = caption_messages(record, name, caption, self.instructions, identity, 1)
        metadata = question_metadata(metadata, messages, name)
        return Sample(name, self.name, messages, [image], metadata, notes=notes)


# Fields of a record that is more than a caption, which would leave them out.
CHAT_KEYS = (
    "question",
    "prompt",
    "query",
    "instruction",
    "instructions",
    *VIDEOS,
    *TOOLS,
    *CHATS,
    *IMAGES,
)
