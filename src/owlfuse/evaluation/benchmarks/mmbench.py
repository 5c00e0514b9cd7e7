"""MMBench: multiple choice, right only where it is right however the options are turned."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.data.readers.text_table import TextTable
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


def is_index(text: str) -> bool:
    """Returns whether a text is a row's number: Python reads none of thousands of digits."""
    return text.isdecimal() and len(text) < 19


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
        self.table = TextTable(self.file, "\t")
        header = self.table.header
        if missing := [name for name in REQUIRED_COLUMNS if name not in header]:
            raise DataError(
                f"{self.file}: line 1 has no column '{missing[0]}'; it has "
                f"{', '.join(header)[:200]}"
            )
        self.rows: dict[str, int] = {}
        for number in range(len(self.table)):
            # a wrong row is told where it is asked, and left out if it may be
            with suppress(DataError):
                self.rows[self.table[number]["index"]] = number
        # a file with rotations is not to be rotated again
        self.has_rotations = any(
            int(index) >= ROTATION_OFFSET for index in self.rows if is_index(index)
        )
        return range(len(self.table))

    def record_name(self, number: int) -> str:
        """Returns the record's line in the file; the first line is the header."""
        return f"line {self.table.lines.number(number + 1)}"

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields a question for each rotation."""
        row = self.table[record]
        index = require_field(row, "index", str, where)
        filled = [letter for letter in ascii_uppercase if not is_empty(row.get(letter, ""))]
        # an option that is left out would make the question easier
        if filled != list(LETTERS[: len(filled)]):
            raise DataError(
                f"{where}: its options are {', '.join(filled)}, expected A, B, ... without a gap, "
                f"{LETTERS[-1]} the last"
            )
        options = [row[letter] for letter in filled]
        right = LETTERS[: len(options)].find(row["answer"]) if row["answer"] else -1
        if not is_index(index) or len(options) < 2 or right < 0:
            raise DataError(
                f"{where}: 'index' {index!r}, {len(options)} options and 'answer' "
                f"{row['answer']!r}; expected a number, two or more and the letter of one"
            )
        hint = "" if is_empty(row.get("hint", "")) else row["hint"]
        # rotations in the file count together with the row that they were made of
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
        image = self.table[self.rows[index]]["image"]
        # rotations refer to the picture of the row they were made of
        if len(image) <= MAX_REFERENCE and image in self.rows:
            image = self.table[self.rows[image]]["image"]
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
        circular_lines, first_scores = [], []
        for rotations in units.values():
            first = rotations[0]
            # right only where every rotation is
            score = min(line["score"] for line in rotations)
            circular_lines.append({"group": first["group"], "score": score})
            first_scores.append(first["score"])
        metrics = super().metrics(circular_lines)
        # the two totals stand first, before the categories
        accuracy = metrics.pop("accuracy")
        return {"accuracy": accuracy, "accuracy_once": mean(first_scores), **metrics}


def is_empty(text: str) -> bool:
    """Returns whether a field stands for no value."""
    return text.strip().lower() in EMPTY
