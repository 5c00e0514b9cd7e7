"""Caption pairs, `{"id", "image", "caption"}`: JSON, JSONL, CSV or TSV with a header."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.files import decoded
from owlfuse.core.types import JsonObject, Sample, without_keys
from owlfuse.data.formats.base import PictureSource, field
from owlfuse.data.formats.records import CHATS, IMAGES, TOOLS, VIDEOS, check_unused, system_turn
from owlfuse.data.formats.turn_keys import SYSTEM_KEYS, brief, is_absent
from owlfuse.data.formats.turns import caption_messages, picture_of
from owlfuse.data.readers.lines import Lines


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
        rows = Rows(self.file, tabs=self.file.suffix == ".tsv")
        for column in (self.image_field, self.caption_field):
            if column not in rows.header:
                raise DataError(
                    f"{self.file} has no column {column!r}; its header has {', '.join(rows.header)}"
                )
        return rows

    def location(self, index: int) -> str:
        """See `Source`."""
        if isinstance(self.records, Rows):
            return f"line {self.records.lines.number(index + 1)} of {self.file.name}"
        return super().location(index)

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        caption = field(record, self.caption_field, str, name)
        if self.image_field not in record:
            raise DataError(
                f"sample {name} has no '{self.image_field}'; it has {', '.join(sorted(record))}"
            )
        image = picture_of(record[self.image_field], name, self.image_field)
        identity = name.removeprefix(f"{self.name}:")
        used = {"id", self.image_field, self.caption_field, *SYSTEM_KEYS}
        metadata = without_keys(record, used)
        check_caption(metadata, name)
        unused = without_keys(metadata, IMAGES)
        # The picture is there for the check alone: a key such as `photo` is no second one.
        notes = check_unused({**unused, "image": image}, name, set(unused))
        messages = caption_messages(1, caption, self.instructions or [], identity, name)
        for turn in system_turn(record, name, []):
            part = {"type": "text", "text": turn["content"]}
            messages.insert(0, {"role": "system", "content": [part]})
        return Sample(name, self.name, messages, [image], metadata, notes=notes)


# Fields of a record that is more than a caption.
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


def check_caption(metadata: JsonObject, name: str) -> None:
    """Raise DataError for a record with a question or another picture, which a caption would leave
    out."""
    for key in CHAT_KEYS:
        if not is_absent(metadata.get(key)):
            raise DataError(
                f"sample {name} has '{key}': {brief(metadata[key])}, which is no part of a "
                "caption; expected the format llava or messages, or a file without it"
            )


class Rows(Sequence[dict[str, str]]):
    """The rows of a CSV or TSV file below its header, as dicts, by number.

    Raises:
        DataError: no header; at `[k]`, a row of another width than the header or one that is not
            UTF-8.
    """

    def __init__(self, file: Any, tabs: bool) -> None:
        self.tabs = tabs
        self.lines = Lines(file, quoted=not tabs)
        if not len(self.lines):
            raise DataError(f"{file}: holds no record, not even a header")
        self.header = self.fields(0)

    def __len__(self) -> int:
        return len(self.lines) - 1

    def __getitem__(self, index: int) -> dict[str, str]:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        fields = self.fields(index + 1)
        if len(fields) != len(self.header):
            raise DataError(
                f"{self.location(index + 1)}, which begins {fields[0][:40]!r}, has {len(fields)} "
                f"fields, the header has {len(self.header)}"
            )
        return dict(zip(self.header, fields, strict=True))

    def location(self, number: int) -> str:
        """Return the file and the line of a row, the header being row 0, for a message."""
        return f"{self.lines.file}: line {self.lines.number(number)}"

    def fields(self, number: int) -> list[str]:
        """Return the fields of a row, the header being row 0."""
        raw = self.lines[number]
        try:
            text = decoded(raw, "")
            # A TSV has no quoting rule; csv.reader would join lines at a lone quote.
            if self.tabs:
                return [unquoted(part) for part in text.split("\t")]
            rows = list(csv.reader(text.splitlines(keepends=True), strict=True))
        except DataError as error:
            raise DataError(f"{self.location(number)}{error}") from error
        except csv.Error as error:
            raise DataError(f"{self.location(number)} is not CSV: {error}") from error
        # Lines ends a row at a newline outside of quotes, so csv sees another row only where quotes
        # do not pair.
        if len(rows) != 1:
            raise DataError(
                f"{self.location(number)} is {len(rows)} rows: a double quote opens and is not "
                "closed"
            )
        return rows[0]


def unquoted(part: str) -> str:
    """Return a TSV field without the quotes that some writers put around it; quotes that do not
    pair are part of the text."""
    inner = part[1:-1].replace('""', "")
    if len(part) >= 2 and part[0] == part[-1] == '"' and '"' not in inner:
        return part[1:-1].replace('""', '"')
    return part
