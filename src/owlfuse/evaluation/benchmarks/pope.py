"""POPE: questions of yes and no about objects that are there or are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics.functional import classification

from owlfuse.core.errors import DataError
from owlfuse.data.readers.lines import JsonLines
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, require_field


def says_yes(answer: str) -> bool:
    """The published script's reading (github.com/AoiDragon/POPE, evaluate.py): the first sentence
    is a no where one of its words is `No`, `no` or `not`; all else is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def yes_no_metrics(answers: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """accuracy, precision, recall and f1 with yes as the positive, and the share of answers that
    are yes."""
    predicted, expected = torch.tensor(answers).int(), torch.tensor(labels).int()
    return {
        "accuracy": float(classification.binary_accuracy(predicted, expected)),
        "precision": float(classification.binary_precision(predicted, expected)),
        "recall": float(classification.binary_recall(predicted, expected)),
        "f1": float(classification.binary_f1_score(predicted, expected)),
        "yes_share": mean([float(answer) for answer in answers]),
    }


@dataclass(kw_only=True)
class POPE(Task):
    """POPE (arXiv 2305.10355): coco_pope_{random,popular,adversarial}.json, a question a line.
    `file` takes braces and globs; what a file's name ends in is its category."""

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        # coco_pope_random.json -> random
        files = [(file.stem.rpartition("_")[2], JsonLines(file)) for file in self.files()]
        self.records = JoinedRecords(files)
        return self.records

    def record_name(self, number: int) -> str:
        """Returns the line in the file of its category."""
        return self.records.line_name(number)

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        category, content = record
        where = f"{where} ({category})"
        identity = require_field(content, "question_id", (int, str), where)
        image = require_field(content, "image", str, where)
        label = require_field(content, "label", str, where)
        if label not in ("yes", "no"):
            raise DataError(f"{where}: 'label' is {label[:40]!r}, expected yes or no")
        messages = self.user_turn(require_field(content, "text", str, where), [image])
        yield Question(f"{category}:{identity}", messages, [image], label, category)

    def score(self, line: dict[str, Any]) -> float:
        """1 where the answer is right."""
        return float(says_yes(line["answer"]) == (line["expected"] == "yes"))

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """Returns the figures of each category, and first their means over the categories."""
        metrics: dict[str, float] = {}
        values_by_metric: dict[str, list[float]] = {}
        for category in dict.fromkeys(line["group"] for line in lines):
            in_category = [line for line in lines if line["group"] == category]
            answers = [says_yes(line["answer"]) for line in in_category]
            labels = [line["expected"] == "yes" for line in in_category]
            for name, value in yes_no_metrics(answers, labels).items():
                values_by_metric.setdefault(name, []).append(value)
                metrics[f"{name}/{category}"] = value
        means = {name: mean(values) for name, values in values_by_metric.items()}
        return means | metrics


class JoinedRecords(Sequence[Any]):
    """Records of several files one after the other, each with its file's category."""

    def __init__(self, files: list[tuple[str, JsonLines]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return sum(len(records) for _, records in self.files)

    def line_name(self, index: int) -> str:
        """Returns which line of its file a record is."""
        _, records, number = self.locate(index)
        return f"line {records.lines.number(number)}"

    def __getitem__(self, index: int) -> tuple[str, Any]:  # type: ignore[override]  # no slices
        category, records, number = self.locate(index)
        return category, records[number]

    def locate(self, index: int) -> tuple[str, JsonLines, int]:
        """Returns the category, the records of its file, and the number of a record in them."""
        for category, records in self.files:
            if index < len(records):
                return category, records, index
            index -= len(records)
        raise IndexError(index)
