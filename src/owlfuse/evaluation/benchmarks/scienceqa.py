"""ScienceQA: multiple choice by letter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from owlfuse.core.errors import DataError
from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, require_field, require_texts

LETTERS = "ABCDE"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def letter_of(answer: str) -> str | None:
    """The letter that an answer names by LLaVA's rule (llava/eval/eval_science_qa.py): it is the
    letter, begins with `B. `, or says `The answer is B`. None where it names none."""
    answer = answer.replace("\n", ". ")
    if answer.strip() in set(LETTERS):
        return answer.strip()
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    # the one with a period first, as the script does
    for pattern in (r"The answer is ([A-E])\.", r"The answer is ([A-E])"):
        if match := re.search(pattern, answer):
            return match[1]
    return None


def with_options(question: str, hint: str, options: Sequence[str]) -> str:
    """The question as LLaVA asks it: the hint, the question, an option a line."""
    lines = [hint, question] if hint else [question]
    for letter, option in zip(LETTERS, options):
        lines.append(f"{letter}. {option}")
    return "\n".join(lines)


@dataclass(kw_only=True)
class ScienceQA(Task):
    """ScienceQA (arXiv 2209.09513): problems.json and, as `splits`, pid_splits.json; pictures are
    <split>/<pid>/<image> below the image root.

    Args:
        split: train, val, test, minival or minitest.
        with_pictures: ask only the questions that have a picture (as in the column IMG).
        hint: what stands before the context of a question that has one.
    """

    file_fields: ClassVar = ("file", "splits")

    splits: Path
    split: str = "test"
    with_pictures: bool = False
    hint: str = "Context: "

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        problems = read_json(self.file)
        # of the split, in the published order
        pids = require_texts(read_json(self.splits), self.split, f"{self.splits}")
        if missing := [pid for pid in pids if pid not in problems]:
            raise DataError(
                f"{self.file} has no problem {missing[0]}, which {self.splits} has in {self.split}"
            )
        if self.with_pictures:
            pids = [pid for pid in pids if has_picture(problems[pid])]
        return [(pid, problems[pid]) for pid in pids]

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        pid, problem = record
        where = f"{where} ({pid})"
        options = require_texts(problem, "choices", where)
        right = require_field(problem, "answer", int, where)
        if not 0 <= right < len(options) <= len(LETTERS):
            raise DataError(
                f"{where}: 'answer' is {right}, and there are {len(options)} 'choices' (at most "
                f"{len(LETTERS)})"
            )
        images: list[str | bytes] = []
        context = []
        hint = require_field(problem, "hint", str, where).strip()
        if hint:
            hint = f"{self.hint}{hint}"
            context.append("TXT")
        if has_picture(problem):
            split = require_field(problem, "split", str, where)
            images.append(f"{split}/{pid}/{problem['image']}")
            context.append("IMG")
        text = with_options(require_field(problem, "question", str, where), hint, options)
        expected = {"letter": LETTERS[right], "context": context or ["NO"]}
        subject = require_field(problem, "subject", str, where)
        group = SUBJECTS.get(subject, subject)
        yield Question(pid, self.user_turn(text, images), images, expected, group)

    def score(self, line: dict[str, Any]) -> float:
        """Returns 1 where the answer's letter is the right one."""
        return float(letter_of(line["answer"]) == line["expected"]["letter"])

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy`, by subject, and by what comes with the question: a hint (TXT), a picture
        (IMG), neither (NO)."""
        metrics = {"accuracy": mean([line["score"] for line in lines])}
        for name in (*SUBJECTS.values(), "TXT", "IMG", "NO"):
            scores = []
            for line in lines:
                if line["group"] == name or name in line["expected"]["context"]:
                    scores.append(line["score"])
            if scores:
                metrics[f"accuracy/{name}"] = mean(scores)
        return metrics


def has_picture(problem: Any) -> bool:
    """Whether a problem names a picture."""
    return isinstance(problem, dict) and bool(problem.get("image"))
