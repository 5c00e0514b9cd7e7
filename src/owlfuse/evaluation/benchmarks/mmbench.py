"""MMBench: multiple choice, right only where it is right however the options are turned."""

from __future__ import annotations

import base64
import binascii
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.files import decoded
from owlfuse.data.readers.lines import Lines
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, value
from owlfuse.evaluation.benchmarks.scienceqa import with_options

LETTERS = "ABCD"
NEEDED = ("index", "question", "A", "B", "answer", "image")
EMPTY = ("", "nan", "none")
REFERENCE = 64
"""Characters of an `image` field that is no picture but the index of the row that has it
(VLMEvalKit)."""
TURNED = 1_000_000
"""A row of an index above it is a rotation, made by the publisher, of the row of the rest of its
index."""


def letter_among(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer means by exact matching, the first step of MMBench's own evaluation
    (can_infer; the second asks another model, which is not done here): the only letter among its
    words, else the only option whose text stands in it.

    An A among more than three words may be an article and is no letter, as in MMBench's script;
    VLMEvalKit takes it.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and not (named == ["A"] and len(words) > 3):
        return named[0]
    text = answer.lower()
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
        """See `Task`."""
        csv.field_size_limit(sys.maxsize)
        self.lines = Lines(self.file, quoted=True)
        if not len(self.lines):
            raise DataError(f"{self.file}: is empty")
        self.columns = cells(self.lines[0], f"{self.file}: line 1")
        if missing := [name for name in NEEDED if name not in self.columns]:
            raise DataError(
                f"{self.file}: line 1 has no column '{missing[0]}'; it has "
                f"{', '.join(self.columns)[:200]}"
            )
        self.rows: dict[str, int] = {}
        place = self.columns.index("index")
        for line in range(1, len(self.lines)):
            self.rows[
                cells(self.lines[line], f"{self.file}: line {self.lines.number(line)}", place)[
                    place
                ]
            ] = line
        self.turned = any(int(index) >= TURNED for index in self.rows if index.isdigit())
        return range(1, len(self.lines))

    def place(self, number: int) -> str:
        """See `Task`; the first line is the header."""
        return f"line {self.lines.number(number + 1)}"

    def row(self, line: int, where: str) -> dict[str, str]:
        """A line's fields by their columns. Raises DataError."""
        found = cells(self.lines[line], where)
        if len(found) != len(self.columns):
            raise DataError(
                f"{where} has {len(found)} fields, and line 1 names {len(self.columns)}"
            )
        return dict(zip(self.columns, found))

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`; a question for each rotation."""
        row = self.row(record, where)
        index = value(row, "index", str, where)
        options = [row[letter] for letter in LETTERS if letter in row]
        options = options[
            : next((n for n, option in enumerate(options) if is_empty(option)), len(options))
        ]
        right = LETTERS[: len(options)].find(row["answer"]) if row["answer"] else -1
        if not index.isdigit() or len(options) < 2 or right < 0:
            raise DataError(
                f"{where}: 'index' {index!r}, {len(options)} options and 'answer' "
                f"{row['answer']!r}; expected a number, two "
                "or more and the letter of one"
            )
        hint = "" if is_empty(row.get("hint", "")) else row["hint"]
        unit = str(int(index) % TURNED)
        for turn in range(len(options) if self.circular and not self.turned else 1):
            shown = options[turn:] + options[:turn]
            expected = {
                "letter": LETTERS[(right - turn) % len(options)],
                "options": dict(zip(LETTERS, shown)),
            }
            messages = self.asked(with_options(row["question"], hint, shown), [index])
            yield Question(
                f"{index}#{turn}", messages, [index], expected, row.get("category", ""), unit
            )

    def pictures(self, question: Question) -> list[str | bytes]:
        """See `Task`; the picture is read from its line when it is asked for."""
        index = str(question.images[0])
        where = f"{self.file}: index {index}"
        image = self.row(self.rows[index], where)["image"]
        if len(image) <= REFERENCE and image in self.rows:
            image = self.row(self.rows[image], where)["image"]
        try:
            return [base64.b64decode(image, validate=True)]
        except binascii.Error as error:
            raise DataError(f"{where}: 'image' is not base64: {error}") from error

    def score(self, line: dict[str, Any]) -> float:
        """1 where the option of this one rotation is right."""
        expected = line["expected"]
        return float(letter_among(line["answer"], expected["options"]) == expected["letter"])

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy`, circular where it was asked so, and by category; `accuracy_once`: of the
        options as they stand."""
        units: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            units.setdefault(str(int(line["id"].partition("#")[0]) % TURNED), []).append(line)
        right = {unit: min(line["score"] for line in mine) for unit, mine in units.items()}
        groups = {unit: mine[0]["group"] for unit, mine in units.items()}
        metrics = {
            "accuracy": mean(list(right.values())),
            "accuracy_once": mean([m[0]["score"] for m in units.values()]),
        }
        for name in sorted(set(groups.values()) - {""}):
            metrics[f"accuracy/{name}"] = mean(
                [right[unit] for unit, group in groups.items() if group == name]
            )
        return metrics


def cells(raw: bytes, where: str, last: int | None = None) -> list[str]:
    """The fields of a line of a TSV; those up to `last`, where it is enough. Raises DataError."""
    if last is not None and b'"' not in raw:
        return decoded(b"\t".join(raw.split(b"\t", last + 1)[: last + 1]), where).split("\t")
    text = decoded(raw, where)
    try:
        return next(
            csv.reader(
                [text] if "\n" not in text else text.splitlines(keepends=True), delimiter="\t"
            )
        )
    except csv.Error as error:
        raise DataError(f"{where}: not TSV: {error}") from error


def is_empty(text: str) -> bool:
    """Whether a field says that it is none."""
    return text.strip().lower() in EMPTY
