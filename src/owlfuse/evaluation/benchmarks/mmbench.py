"""MMBench: multiple choice, right only where it is right however the options are turned."""

from __future__ import annotations

import base64
import binascii
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.files import decoded
from owlfuse.data.readers.lines import Lines
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, require_field
from owlfuse.evaluation.benchmarks.scienceqa import with_options

LETTERS = "ABCD"
REQUIRED_COLUMNS = ("index", "question", "A", "B", "answer", "image")
EMPTY = ("", "nan", "none")
MAX_REFERENCE = 64
"""Characters of an `image` field that is no picture but the index of the row that has it
(VLMEvalKit)."""
ROTATION_OFFSET = 1_000_000
"""A row of an index above it is a rotation, made by the publisher, of the row of the rest of its
index."""


def letter_among(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer means by exact matching, the first step of MMBench's own evaluation
    (can_infer; the second asks another model, which is not done here): the only letter among its
    words, else the only option whose text stands in it.

    An A among more than three words may be an article and is no letter, as in MMBench's script;
    VLMEvalKit takes it.
    """
    # the punctuation that MMBench's script removes
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and not (named == ["A"] and len(words) > 3):
        return named[0]
    text = answer.lower()
    # MMBench's own limit: a long answer may mention several options
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    inside = [letter for letter, option in options.items() if option.lower() in text]
    return inside[0] if len(inside) == 1 else None


@dataclass(kw_only=True)
class MMBench(Task):
    """MMBench (arXiv 2307.06281): a TSV with index, question, hint, A to D, answer, category and
    the picture in base64.

    Args:
        circular: ask every question with its options turned by 0, 1, ... places; it counts where
            all are right (section 4.1 of the paper). False: as it stands, once.
    """

    circular: bool = True

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        # a picture in base64 is longer than csv's limit of 128 KB
        csv.field_size_limit(sys.maxsize)
        self.lines = Lines(self.file, quoted=True)
        if not len(self.lines):
            raise DataError(f"{self.file}: is empty")
        self.columns = cells(self.lines[0], f"{self.file}: line 1")
        if missing := [name for name in REQUIRED_COLUMNS if name not in self.columns]:
            raise DataError(
                f"{self.file}: line 1 has no column '{missing[0]}'; it has "
                f"{', '.join(self.columns)[:200]}"
            )
        self.rows: dict[str, int] = {}
        column = self.columns.index("index")
        for line in range(1, len(self.lines)):
            where = f"{self.file}: line {self.lines.number(line)}"
            fields = cells(self.lines[line], where, column)
            self.rows[fields[column]] = line
        # a file with rotations is not to be rotated again
        self.has_rotations = any(
            int(index) >= ROTATION_OFFSET for index in self.rows if index.isdigit()
        )
        return range(1, len(self.lines))

    def record_name(self, number: int) -> str:
        """Returns the record's line in the file; the first line is the header."""
        return f"line {self.lines.number(number + 1)}"

    def row(self, line: int, where: str) -> dict[str, str]:
        """Returns a line's fields by their columns. Raises DataError."""
        fields = cells(self.lines[line], where)
        if len(fields) != len(self.columns):
            raise DataError(
                f"{where} has {len(fields)} fields, and line 1 names {len(self.columns)}"
            )
        return dict(zip(self.columns, fields))

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields a question for each rotation."""
        row = self.row(record, where)
        index = require_field(row, "index", str, where)
        columns = [letter for letter in LETTERS if letter in row]
        options = [row[letter] for letter in takewhile(lambda c: not is_empty(row[c]), columns)]
        right = LETTERS[: len(options)].find(row["answer"]) if row["answer"] else -1
        if not index.isdigit() or len(options) < 2 or right < 0:
            raise DataError(
                f"{where}: 'index' {index!r}, {len(options)} options and 'answer' "
                f"{row['answer']!r}; expected a number, two or more and the letter of one"
            )
        hint = "" if is_empty(row.get("hint", "")) else row["hint"]
        unit = str(int(index) % ROTATION_OFFSET)
        rotations = len(options) if self.circular and not self.has_rotations else 1
        for turn in range(rotations):
            rotated = options[turn:] + options[:turn]
            expected = {
                "letter": LETTERS[(right - turn) % len(options)],
                "options": dict(zip(LETTERS, rotated)),
            }
            messages = self.user_turn(with_options(row["question"], hint, rotated), [index])
            category = row.get("category", "")
            yield Question(f"{index}#{turn}", messages, [index], expected, category, unit)

    def pictures(self, question: Question) -> list[str | bytes]:
        """Returns the picture, read from its line only now."""
        index = str(question.images[0])
        where = f"{self.file}: index {index}"
        image = self.row(self.rows[index], where)["image"]
        # rotations refer to the picture of the row they were made of
        if len(image) <= MAX_REFERENCE and image in self.rows:
            image = self.row(self.rows[image], where)["image"]
        try:
            return [base64.b64decode(image, validate=True)]
        except binascii.Error as error:
            raise DataError(f"{where}: 'image' is not base64: {error}") from error

    def score(self, line: dict[str, Any]) -> float:
        """Returns 1 where the option of this one rotation is right."""
        expected = line["expected"]
        return float(letter_among(line["answer"], expected["options"]) == expected["letter"])

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy`, circular where it was asked so, and by category; `accuracy_once`: of the
        options as they stand."""
        units: dict[int, list[dict[str, Any]]] = {}
        for line in lines:
            index = int(line["id"].partition("#")[0])
            units.setdefault(index % ROTATION_OFFSET, []).append(line)
        circular_scores, first_scores = [], []
        scores_by_category: dict[str, list[float]] = {}
        for rotations in units.values():
            # right only where every rotation is
            score = min(line["score"] for line in rotations)
            circular_scores.append(score)
            first_scores.append(rotations[0]["score"])
            if rotations[0]["group"]:
                scores_by_category.setdefault(rotations[0]["group"], []).append(score)
        metrics = {"accuracy": mean(circular_scores), "accuracy_once": mean(first_scores)}
        for name in sorted(scores_by_category):
            metrics[f"accuracy/{name}"] = mean(scores_by_category[name])
        return metrics


def cells(raw: bytes, where: str, last: int | None = None) -> list[str]:
    """Returns the fields of a line of a TSV; those up to `last`, where it is enough. Raises
    DataError."""
    # the picture, a long last field, is not decoded only to find a row's index
    if last is not None and b'"' not in raw:
        first_fields = raw.split(b"\t", last + 1)[: last + 1]
        return decoded(b"\t".join(first_fields), where).split("\t")
    text = decoded(raw, where)
    lines = [text] if "\n" not in text else text.splitlines(keepends=True)
    try:
        return next(csv.reader(lines, delimiter="\t"))
    except csv.Error as error:
        raise DataError(f"{where}: not TSV: {error}") from error


def is_empty(text: str) -> bool:
    """Returns whether a field stands for no value."""
    return text.strip().lower() in EMPTY
