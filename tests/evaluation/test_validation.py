"""What an evaluation is told to do, and what it tells."""

from types import SimpleNamespace

import pytest
from torch import nn

from owlfuse.core.types import Sample
from owlfuse.evaluation import validation
from owlfuse.evaluation.metrics import Answer
from owlfuse.evaluation.validation import LEAST, Evaluation


@pytest.mark.parametrize("name", [*LEAST, "max_questions"])
def test_numbers_that_leave_nothing_to_do_are_refused_before_the_training(name):
    Evaluation(**{name: max(1, LEAST.get(name, 1))})
    with pytest.raises(ValueError, match=rf"evaluation.{name} is -1, expected at least \d"):
        Evaluation(**{name: -1})
    if LEAST.get(name, 1):
        with pytest.raises(ValueError, match=f"evaluation.{name} is 0, expected at least 1"):
            Evaluation(**{name: 0})


def evaluate(monkeypatch, answers, *arguments, **options):
    """An evaluation of one source whose answers are these."""
    questions = [(Sample(answer.id, answer.source, []), "red", "") for answer in answers]
    monkeypatch.setattr(validation, "questions_of", lambda *given: questions)
    monkeypatch.setattr(validation, "mean_loss", lambda *given: 1.0)
    monkeypatch.setattr(validation, "answer_questions", lambda *given: answers)
    evaluation = Evaluation(decode_tokens=0, **options)
    data = SimpleNamespace(validation={"val": range(len(answers))})
    evaluation(nn.Linear(1, 1), data, *arguments)
    return evaluation


def test_thoughts_that_did_not_end_are_counted_and_told(monkeypatch, caplog):
    answers = []
    for number, unfinished in enumerate((True, False, True)):
        answer = Answer("val", f"val:{number}#0", None, "?", "red", "red", "")
        answer.thought_unfinished = unfinished
        answers.append(answer)
    evaluation = evaluate(monkeypatch, answers)
    assert evaluation.counts["val"]["thoughts that did not end"] == 2
    assert "val: 2 of 3 thoughts did not end" in caplog.text
    assert "raise evaluation.max_new_tokens, which is 24" in caplog.text
