"""Requests of several rounds, each of which the task makes of the answers before it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from owlfuse.lmms.answers import Options, Request

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from owlfuse.lmms.models import Owlfuse


class Rounds:
    """A request of several rounds on its way.

    Attributes:
        answers: so far.
        next: the round to come, None after the last.
    """

    def __init__(self, model: Owlfuse, request: Instance) -> None:
        text, generation, visuals, self.said, *self.where = request.args
        self.model = model
        self.name = name_of(*self.where)
        self.options = Options.of(generation or {}, self.name)
        self.answers: list[str] = []
        self.info: Any = None
        make = partial(model.question, self.name, text, visuals, *self.where)
        self.next: Request | None = Request(self.name, len(text), make, self.options)

    def go_on(self, text: str) -> None:
        """Takes the round's answer, and asks the task for the next."""
        self.answers.append(text)
        doc_id, task, split = self.where
        step = {"round_idx": len(self.answers), "previous_round_info": self.info}
        visuals, question, last, answers, self.info = self.said(
            self.model.task_dict[task][split][doc_id], previous_output=list(self.answers), **step
        )
        if last:
            self.answers, self.next = list(answers), None
            return
        make = partial(self.model.opener.question, self.name, question, visuals)
        self.next = Request(self.name, len(question), make, self.options, turn=len(self.answers))


def name_of(doc_id: Any, task: Any, split: Any = None) -> str:
    """A document's name in messages."""
    return f"task {task}, document {doc_id}" + (f" of {split}" if split else "")
