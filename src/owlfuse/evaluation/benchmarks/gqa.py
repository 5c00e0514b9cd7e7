"""GQA: the answer, word for word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import (
    Question,
    Task,
    image_file,
    require_field,
)


@dataclass(kw_only=True)
class GQA(Task):
    """GQA (arXiv 1902.09506): <split>_balanced_questions.json, an object of questions by their ids.
    `accuracy` is also by the structural type: verify, query, choose, logical, compare.

    Args:
        image_name: a picture's file, from the record's `{image_id}`.
    """

    image_name: str = "{image_id}.jpg"

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        return list(read_json(self.file).items())

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        identity, content = record
        where = f"{where} ({identity})"
        image = image_file(self.image_name, image_id=require_field(content, "imageId", str, where))
        # the question's structural type, which accuracy is reported by
        types = require_field(content, "types", dict, where)
        kind = require_field(types, "structural", str, f"{where}: types")
        messages = self.user_turn(require_field(content, "question", str, where), [image])
        answer = require_field(content, "answer", str, where)
        yield Question(identity, messages, [image], answer, kind)

    def score(self, line: dict[str, Any]) -> float:
        """1 where the answer is the expected one; its case and periods at its end do not matter, as
        in LLaVA's convert_gqa_for_eval.py, whose output GQA's own eval.py compares."""
        return float(line["answer"].rstrip(".").lower() == line["expected"])
