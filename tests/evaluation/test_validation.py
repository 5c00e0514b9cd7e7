"""What an evaluation is told to do, and what it tells."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from owlfuse.artifacts.resume import Past, changed_evaluation_keys
from owlfuse.config.build import to_dict
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.types import Sample
from owlfuse.data.mixture.positions import StepPositions
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
    questions = []
    for answer in answers:
        images = [answer.image] if answer.image else []
        questions.append((Sample(answer.id, answer.source, [], images), "red", ""))
    monkeypatch.setattr(validation, "questions_of", lambda *given: questions)
    monkeypatch.setattr(validation, "mean_loss", lambda *given: 1.0)
    monkeypatch.setattr(validation, "answer_questions", lambda *given: answers)
    evaluation = Evaluation(decode_tokens=0, blank=False, **options)
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


def test_answers_that_did_not_end_are_counted_and_told_once_there_is_a_trained_model(
    monkeypatch, caplog, tmp_path
):
    answers = []
    for number, (cut, unfinished) in enumerate([(True, False), (False, False), (True, True)]):
        answer = Answer("val", f"val:{number}#0", None, "?", "red", "red", "")
        answer.cut, answer.thought_unfinished = cut, unfinished
        answers.append(answer)
    evaluation = evaluate(monkeypatch, answers)
    assert evaluation.counts["val"]["answers that did not end"] == 1
    assert "answers did not end" not in caplog.text
    evaluate(monkeypatch, answers, tmp_path)
    assert "1 of 3 answers did not end within evaluation.max_new_tokens=24" in caplog.text


def test_what_is_more_than_the_memory_holds_is_told_with_what_goes_on(monkeypatch, tmp_path):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Evaluation, "answer", full)
    message = f"GPU's memory holds; go on with: owlfuse eval {tmp_path} evaluation.batch_size=8"
    with pytest.raises(DataError, match=message):
        evaluate(monkeypatch, [], tmp_path, batch_size=32)
    with pytest.raises(DataError, match=r"memory holds; set evaluation.batch_size=1"):
        evaluate(monkeypatch, [], batch_size=2)


def test_overlays_are_of_the_answers_own_question_where_chats_have_one_id(monkeypatch, tmp_path):
    answers = [Answer("val", "val:a#0", name, "?", "red", "red", "") for name in ("1.png", "2.png")]
    drawn = []

    def map_of_answer(model, data, sample, answer, max_new_tokens):
        drawn.append((sample.images, answer.image))
        return torch.full((2, 2), float(len(drawn)))

    monkeypatch.setattr("owlfuse.evaluation.explain.contact_sheet.map_of_answer", map_of_answer)
    evaluation = evaluate(monkeypatch, answers, tmp_path, explain=True)
    assert drawn == [(["1.png"], "1.png"), (["2.png"], "2.png")]
    assert [map.mean().item() for map in evaluation.maps.values()] == [1.0, 2.0]


def test_a_run_is_not_evaluated_beside_another_command_of_it(monkeypatch, tmp_path):
    """Else answers.jsonl would be of one and results.json of the other."""
    monkeypatch.setattr(validation, "compose", lambda words: None)
    monkeypatch.setattr(validation, "chosen_checkpoint", lambda folder, which: folder / "a.ckpt")

    def held(path):
        raise BlockingIOError

    monkeypatch.setattr("owlfuse.artifacts.runs.open_locked", held)
    with pytest.raises(ConfigError, match=r"in use by .* stop it"):
        validation.evaluate_run(str(tmp_path), [])


def test_a_run_may_be_evaluated_with_thoughts():
    past = Past(4, to_dict(compose(["experiment=shapes_owl1"])), StepPositions([(0, 0, 8)]))
    changed_evaluation_keys(past, compose(["experiment=shapes_owl1", "data.thinking=true"]))
