"""ScienceQA: multiple choice by letter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import Question, Task, mean, texts, value

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
    found = re.search(r"The answer is ([A-E])\.", answer) or re.search(
        r"The answer is ([A-E])", answer
    )
    return found[1] if found else None


def with_options(question: str, hint: str, options: Sequence[str]) -> str:
    """The question as LLaVA asks it: the hint, the question, an option a line."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    return "\n".join([*([hint] if hint else []), question, *lines])


@dataclass(kw_only=True)
class ScienceQA(Task):
    """ScienceQA (arXiv 2209.09513): problems.json and, as `splits`, pid_splits.json; pictures are
    <split>/<pid>/<image> below the image root.

    Args:
        split: train, val, test, minival or minitest.
        with_pictures: ask only the questions that have a picture (as in the column IMG).
        hint: what stands before the context of a question that has one.
    """

    splits: Path
    split: str = "test"
    with_pictures: bool = False
    hint: str = "Context: "

    def __post_init__(self) -> None:
        super().__post_init__()
        self.splits = Path(self.splits).expanduser()

    def files(self) -> list[Path]:
        """See `Task`."""
        return [self.file, self.splits]

    def open(self) -> Sequence[Any]:
        """See `Task`."""
        problems = read_json(self.file, dict)
        pids = texts(read_json(self.splits, dict), self.split, f"{self.splits}")
        if missing := [pid for pid in pids if pid not in problems]:
            raise DataError(
                f"{self.file} has no problem {missing[0]}, which {self.splits} has in {self.split}"
            )
        return [
            (pid, problems[pid])
            for pid in pids
            if not self.with_pictures or has_picture(problems[pid])
        ]

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`."""
        pid, problem = record
        where = f"{where} ({pid})"
        options, right = texts(problem, "choices", where), value(problem, "answer", int, where)
        if not 0 <= right < len(options) <= len(LETTERS):
            raise DataError(
                f"{where}: 'answer' is {right}, and there are {len(options)} 'choices' (at most "
                f"{len(LETTERS)})"
            )
        images: list[str | bytes] = (
            [f"{value(problem, 'split', str, where)}/{pid}/{problem['image']}"]
            if has_picture(problem)
            else []
        )
        hint = value(problem, "hint", str, where).strip()
        text = with_options(
            value(problem, "question", str, where), f"{self.hint}{hint}" if hint else "", options
        )
        expected = {
            "letter": LETTERS[right],
            "context": [name for name, there in (("TXT", hint), ("IMG", images)) if there]
            or ["NO"],
        }
        subject = value(problem, "subject", str, where)
        yield Question(
            pid, self.asked(text, images), images, expected, SUBJECTS.get(subject, subject)
        )

    def score(self, line: dict[str, Any]) -> float:
        """1 where the answer's letter is the right one."""
        return float(letter_of(line["answer"]) == line["expected"]["letter"])

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy`, by subject, and by what comes with the question: a hint (TXT), a picture
        (IMG), neither (NO)."""
        metrics = {"accuracy": mean([line["score"] for line in lines])}
        groups = {
            name: [line for line in lines if line["group"] == name] for name in SUBJECTS.values()
        }
        groups |= {
            name: [line for line in lines if name in line["expected"]["context"]]
            for name in ("TXT", "IMG", "NO")
        }
        return metrics | {
            f"accuracy/{k}": mean([one["score"] for one in mine])
            for k, mine in groups.items()
            if mine
        }


def has_picture(problem: Any) -> bool:
    """Whether a problem names a picture."""
    return isinstance(problem, dict) and bool(problem.get("image"))
