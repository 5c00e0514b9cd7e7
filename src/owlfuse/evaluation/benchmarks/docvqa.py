"""DocVQA: average normalised Levenshtein similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import Question, Task, require_field, require_texts

THRESHOLD = 0.5


def anls(answer: str, answers: Sequence[str]) -> float:
    """1 - edit distance / length of the longer, the best of the expected answers, and 0 below 0.5
    (arXiv 1905.13648, eq. 1).

    Case and runs of white space do not matter to the distance, but the lengths are those of the
    texts as they are, as in the challenge's own script (rrc.cvc.uab.es, tasks of ch=17).
    """
    distances = []
    for expected in answers:
        distance = edit_distance(single_spaced(answer), single_spaced(expected))
        # at least 1: two empty texts are equal
        longer = max(len(answer), len(expected), 1)
        distances.append(distance / longer)
    similarity = 1 - min(distances)
    # below it an answer counts as wrong and not as badly read
    return similarity if similarity >= THRESHOLD else 0.0


def edit_distance(written: str, expected: str) -> int:
    """Returns the least number of characters to add, leave out or replace (Levenshtein).

    Ours, since torchmetrics looks only near the diagonal, and finds too many for long texts.
    """
    # the distances of the part so far from each beginning of `expected`
    above = list(range(len(expected) + 1))
    for row, letter in enumerate(written, 1):
        current = [row]
        for column, wanted in enumerate(expected, 1):
            replaced = above[column - 1] + (letter != wanted)
            current.append(min(replaced, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def single_spaced(text: str) -> str:
    """Returns the text in lower case, runs of white space as one space."""
    return " ".join(text.lower().split())


@dataclass(kw_only=True)
class DocVQA(Task):
    """DocVQA's single documents (arXiv 2007.00398): val_v1.0_withQT.json."""

    metric: ClassVar[str] = "anls"

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        return require_field(read_json(self.file), "data", list, f"{self.file}")

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        identity = str(require_field(record, "questionId", (int, str), where))
        image = require_field(record, "image", str, where)
        messages = self.user_turn(require_field(record, "question", str, where), [image])
        yield Question(identity, messages, [image], require_texts(record, "answers", where))

    def score(self, line: dict[str, Any]) -> float:
        """Returns the score of one answer."""
        return anls(line["answer"], line["expected"])
