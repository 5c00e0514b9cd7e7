"""Tables in text files, CSV and TSV: rows below a header, reached by number."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_RECORD, check_distinct, decoded
from owlfuse.data.readers.lines import Lines


class TextTable(Sequence[dict[str, str]]):
    """The rows of a CSV or TSV file below its header, as dicts, by number.

    Args:
        quoted: a field in double quotes may hold delimiters and newlines, `""` being a quote; else
            a row is a line.

    Raises:
        DataError: no header, or one with a column twice; at `[k]`, a row of another width than the
            header or one that is not UTF-8.
    """

    def __init__(self, file: Path, delimiter: str = ",", quoted: bool = True) -> None:
        # csv limits a field to 128 KB, which a picture in base64 exceeds; `Lines` limits a row. The
        # limit is one of the whole process, so that it is raised and never lowered.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
        self.delimiter = delimiter
        self.lines = Lines(file, quoted)
        if not len(self.lines):
            raise DataError(f"{file}: holds no record, not even a header")
        self.header = self.fields(0)
        check_distinct(self.header, file)

    def __len__(self) -> int:
        return len(self.lines) - 1

    def __getitem__(self, index: int) -> dict[str, str]:  # type: ignore[override]  # no slices
        # range() checks the index and turns a negative one.
        index = range(len(self))[index]
        fields = self.fields(index + 1)
        if len(fields) != len(self.header):
            raise DataError(
                f"{self.location(index + 1)}, which begins {fields[0][:40]!r}, has {len(fields)} "
                f"fields, the header has {len(self.header)}"
            )
        if not self.lines.quoted:
            self.check_whole(fields[-1], index + 1)
        return dict(zip(self.header, fields, strict=True))

    def check_whole(self, last: str, number: int) -> None:
        """Raise DataError for a TSV row whose last field begins with a quote that the line does not
        close, where the next line is no row: it is the rest of that field."""
        is_open = last.startswith('"') and last.count('"') % 2 == 1
        if not is_open or number + 1 >= len(self.lines):
            return
        next_fields = self.fields(number + 1)
        if len(next_fields) != len(self.header):
            raise DataError(
                f"{self.location(number)} ends in an open double quote, and the next line has "
                f"{len(next_fields)} fields, the header has {len(self.header)}; in TSV a row is a "
                "line: write it as CSV"
            )

    def location(self, number: int) -> str:
        """Return the file and the line of a row, the header being row 0, for a message."""
        return f"{self.lines.file}: line {self.lines.number(number)}"

    def fields(self, number: int) -> list[str]:
        """Return the fields of a row, the header being row 0."""
        raw = self.lines[number]
        try:
            text = decoded(raw, "")
            if not self.lines.quoted:
                return [unquoted(part) for part in text.split(self.delimiter)]
            # Not by splitlines, which also splits at characters that a field may hold, as U+2028.
            lines = io.StringIO(text, newline="\n")
            rows = list(csv.reader(lines, delimiter=self.delimiter, strict=True))
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
