"""A benchmark: how many things are in a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, require_field


@dataclass(kw_only=True)
class Counting(Task):
    """A list of `{"id", "image", "question", "number"}`.

    Args:
        largest: the largest distance from the right number that counts; an answer without a number
            is so far away.
    """

    largest: int = 10

    def open(self) -> Sequence[Any]:
        """See `Task`."""
        return read_json(self.file, list)

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`."""
        image = require_field(record, "image", str, where)
        messages = self.user_turn(require_field(record, "question", str, where), [image])
        yield Question(
            str(require_field(record, "id", (int, str), where)),
            messages,
            [image],
            require_field(record, "number", int, where),
        )

    def distance(self, line: dict[str, Any]) -> int:
        """Between the first number of the answer and the right one."""
        found = re.search(r"\d+", line["answer"])
        return min(abs(int(found[0]) - line["expected"]), self.largest) if found else self.largest

    def score(self, line: dict[str, Any]) -> float:
        """1 where the number is right."""
        return float(self.distance(line) == 0)

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """The share that is right, and the mean distance."""
        return {
            "accuracy": mean([line["score"] for line in lines]),
            "distance": mean([self.distance(line) for line in lines]),
        }
