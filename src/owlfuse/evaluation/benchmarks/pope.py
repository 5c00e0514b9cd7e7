"""POPE: questions of yes and no about objects that are there or are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torchmetrics.functional import classification

from owlfuse.core.errors import DataError
from owlfuse.data.readers.lines import JsonLines
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, value


def says_yes(answer: str) -> bool:
    """The published script's reading (github.com/AoiDragon/POPE, evaluate.py): the first sentence
    is a no where one of its words is `No`, `no` or `not`; all else is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def yes_no_metrics(answers: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """accuracy, precision, recall and f1 with yes as the positive, and the share of answers that
    are yes."""
    found, wanted = torch.tensor(answers).int(), torch.tensor(labels).int()
    rules = {
        name: getattr(classification, f"binary_{name}")
        for name in ("accuracy", "precision", "recall", "f1_score")
    }
    scores = {
        name.removesuffix("_score"): float(rule(found, wanted)) for name, rule in rules.items()
    }
    return scores | {"yes_share": mean([float(answer) for answer in answers])}


@dataclass(kw_only=True)
class POPE(Task):
    """POPE (arXiv 2305.10355): coco_pope_{random,popular,adversarial}.json, a question a line.
    `file` takes braces and globs; what a file's name ends in is its category."""

    def open(self) -> Sequence[Any]:
        """See `Task`."""
        self.joined = Joined(
            [(file.stem.rpartition("_")[2], JsonLines(file)) for file in self.files()]
        )
        return self.joined

    def place(self, number: int) -> str:
        """See `Task`; the line in the file of its category."""
        return self.joined.place(number)

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`."""
        category, content = record
        where = f"{where} ({category})"
        identity = value(content, "question_id", (int, str), where)
        image, label = value(content, "image", str, where), value(content, "label", str, where)
        if label not in ("yes", "no"):
            raise DataError(f"{where}: 'label' is {label[:40]!r}, expected yes or no")
        messages = self.asked(value(content, "text", str, where), [image])
        yield Question(f"{category}:{identity}", messages, [image], label, category)

    def score(self, line: dict[str, Any]) -> float:
        """1 where the answer is right."""
        return float(says_yes(line["answer"]) == (line["expected"] == "yes"))

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """Of each category, and of several their mean."""
        categories = {}
        for name in dict.fromkeys(line["group"] for line in lines):
            mine = [line for line in lines if line["group"] == name]
            answers, labels = (
                [says_yes(one["answer"]) for one in mine],
                [one["expected"] == "yes" for one in mine],
            )
            categories[name] = yes_no_metrics(answers, labels)
        names = next(iter(categories.values()))
        means = {name: mean([found[name] for found in categories.values()]) for name in names}
        each = (
            {f"{metric}/{name}": number for metric, number in found.items()}
            for name, found in categories.items()
        )
        return means | dict(chain.from_iterable(found.items() for found in each))


class Joined(Sequence[Any]):
    """Records of several files one after the other, each with its file's category."""

    def __init__(self, files: list[tuple[str, JsonLines]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return sum(len(records) for _, records in self.files)

    def place(self, index: int) -> str:
        """Which line of its file a record is."""
        for _, records in self.files:
            if index < len(records):
                return f"line {records.lines.number(index)}"
            index -= len(records)
        raise IndexError(index)

    def __getitem__(self, index: int) -> tuple[str, Any]:  # type: ignore[override]  # no slices
        for category, records in self.files:
            if index < len(records):
                return category, records[index]
            index -= len(records)
        raise IndexError(index)
