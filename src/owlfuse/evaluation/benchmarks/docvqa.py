"""DocVQA: average normalised Levenshtein similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchmetrics.functional.text import edit_distance

from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, texts, value

THRESHOLD = 0.5


def anls(answer: str, answers: Sequence[str]) -> float:
    """1 - edit distance / length of the longer, the best of the expected answers, and 0 below 0.5
    (arXiv 1905.13648, eq. 1).

    Case and runs of white space do not matter to the distance, but the lengths are those of the
    texts as they are, as in the challenge's own script (rrc.cvc.uab.es, tasks of ch=17).
    """
    distances = []
    for expected in answers:
        ours, theirs = (" ".join(text.lower().split()) for text in (answer, expected))
        longer = max(len(answer), len(expected))
        distances.append(
            int(edit_distance(ours, theirs, reduction="sum")) / longer if longer else 0.0
        )
    similarity = 1 - min(distances)
    return similarity if similarity >= THRESHOLD else 0.0


@dataclass(kw_only=True)
class DocVQA(Task):
    """DocVQA's single documents (arXiv 2007.00398): val_v1.0_withQT.json."""

    def open(self) -> Sequence[Any]:
        """See `Task`."""
        return value(read_json(self.file, dict), "data", list, f"{self.file}")

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`."""
        identity = str(value(record, "questionId", (int, str), where))
        image = value(record, "image", str, where)
        messages = self.asked(value(record, "question", str, where), [image])
        yield Question(identity, messages, [image], texts(record, "answers", where))

    def score(self, line: dict[str, Any]) -> float:
        """See `Task`."""
        return anls(line["answer"], line["expected"])

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`anls`."""
        return {"anls": mean([line["score"] for line in lines])}
