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


def prediction(line: dict[str, Any]) -> bool:
    """Returns whether an answer is a yes. A thought that did not end is no answer, which counts as
    the wrong one: the published script reads an empty text as a yes."""
    if line.get("thought_unfinished"):
        return line["expected"] != "yes"
    return says_yes(line["answer"])


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
        """Returns of each record its file's category, the lines of the file, and its number in
        them."""
        self.records: list[tuple[str, JsonLines, int]] = []
        for file in self.files():
            # coco_pope_random.json -> random
            category = file.stem.rpartition("_")[2]
            records = JsonLines(file)
            # a wrong line is told where it is asked, and left out if it may be
            self.records += [(category, records, number) for number in range(len(records))]
        return self.records

    def record_name(self, number: int) -> str:
        """Returns the line in the file of its category."""
        _, records, index = self.records[number]
        return f"line {records.lines.number(index)}"

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        category, records, number = record
        content = records[number]
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
        return float(prediction(line) == (line["expected"] == "yes"))

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """Returns the figures of each category, and first their means over the categories."""
        metrics: dict[str, float] = {}
        values_by_metric: dict[str, list[float]] = {}
        for category in dict.fromkeys(line["group"] for line in lines):
            in_category = [line for line in lines if line["group"] == category]
            answers = [prediction(line) for line in in_category]
            labels = [line["expected"] == "yes" for line in in_category]
            for name, value in yes_no_metrics(answers, labels).items():
                values_by_metric.setdefault(name, []).append(value)
                metrics[f"{name}/{category}"] = value
        means = {name: mean(values) for name, values in values_by_metric.items()}
        return means | metrics
