"""What a run's model answers before training, answers that need only hold what is accepted, and
the everyday questions."""

import json

import lightning
import pytest
import torch
from omegaconf import OmegaConf

from helpers import REPO, TINY_SHAPES
from owlfuse.artifacts.resume import ANSWERED_BY, VALIDATED_BY, samples_changed
from owlfuse.artifacts.weights import read
from owlfuse.config.build import build
from owlfuse.config.compose import compose
from owlfuse.core.errors import DataError
from owlfuse.data.formats.messages import Messages
from owlfuse.evaluation.matching import holds_answer
from owlfuse.evaluation.metrics import Answer, mean_loss, score
from owlfuse.evaluation.questions import question_samples
from owlfuse.evaluation.validation import evaluate_run
from owlfuse.model.multimodal import build_model
from owlfuse.training import train

EVERYDAY = REPO / "src" / "owlfuse" / "data" / "shapes" / "everyday"
SMALL = [
    "experiment=shapes_owl1",
    *TINY_SHAPES,
    "data.workers=0",
    "data.global_batch_size=4",
    "trainer.val_check_interval=2",
]
SMALL += [
    "trainer.max_steps=2",
    "evaluation.max_questions=2",
    "evaluation.max_new_tokens=2",
    "evaluation.contact_sheet=0",
]
SMALL += ["model.llm.config.num_hidden_layers=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with an evaluation before it and without."""
    folder = tmp_path_factory.mktemp("before")
    overrides = [*SMALL, f"data.folder={folder / 'shapes'}", f"runs={folder}"]
    return [
        train.run(compose([*overrides, f"name=run_{before}", f"evaluation.before={before}"]))
        for before in (True, False)
    ]


def results(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


@pytest.mark.slow
def test_the_metrics_before_the_first_step_are_those_of_the_model_as_it_is_built(runs):
    before = {
        k.removeprefix("before/"): v for k, v in results(runs[0]).items() if k.startswith("before/")
    }
    after = {k: v for k, v in results(runs[0]).items() if not k.startswith("before/")}
    assert before.keys() == after.keys() == results(runs[1]).keys()
    assert before["val/loss"] != after["val/loss"]
    assert before["val/loss"] == pytest.approx(loss_as_built(runs[1]), rel=1e-4)
    assert len((runs[0] / "answers_before.jsonl").read_text().splitlines()) == 6


def loss_as_built(folder):
    """The loss on `val` of the model that the run's configuration gives, without its checkpoint."""
    config = compose([f"resume={folder}"])
    data = build(config.data)
    lightning.seed_everything(config.seed, verbose=False)
    model, _ = build_model(OmegaConf.to_container(config.model, resolve=True), data.vocab_size)
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    return mean_loss(model.eval(), data, "val", 64)


@pytest.mark.slow
def test_an_evaluation_before_training_leaves_the_training_as_it_is(runs):
    with_, without = (read(max((folder / "checkpoints").glob("step_*.ckpt")))[0] for folder in runs)
    assert with_.keys() == without.keys()
    assert all(torch.equal(with_[name], without[name]) for name in with_)


def test_an_evaluation_afterwards_keeps_the_metrics_of_before(runs):
    first = results(runs[0])
    evaluate_run(str(runs[0]), [])
    again = results(runs[0])
    assert again.keys() == first.keys()
    assert again["before/val/loss"] == first["before/val/loss"]


def test_a_validation_file_that_was_moved_is_of_the_same_questions():
    path, contents = "data.validation.val.file", "data.validation.val, file (contents)"
    assert not samples_changed([path, "data.validation.val.image_root"], VALIDATED_BY)
    assert samples_changed([path, contents], VALIDATED_BY)
    assert samples_changed(["data.validation.val.history"], ANSWERED_BY)
    assert not samples_changed(["evaluation.max_questions"], VALIDATED_BY)


@pytest.mark.slow
def test_an_evaluation_of_other_questions_leaves_the_metrics_of_before_out(runs, caplog):
    evaluate_run(str(runs[0]), ["evaluation.max_questions=1"])
    assert not [name for name in results(runs[0]) if name.startswith("before/")]
    assert "the metrics of before the first step are left out" in caplog.text
    evaluate_run(str(runs[0]), [])
    assert "before/val/loss" in results(runs[0])


def test_a_source_with_accepted_answers_is_scored_by_what_they_contain_and_others_by_exact_match():
    one, other = (
        Answer("s", "i", None, "q", "4", text, "sum", ("4", "four"))
        for text in ("It is four.", "It is five.")
    )
    assert score([one, other], loss=None) == {"contains": 0.5, "contains/sum": 0.5}
    exact = Answer("s", "i", None, "q", "4", "It is 4.", "")
    assert score([exact]) == {"exact_match": 0.0}


def chats(tmp_path, accepted, questions=1):
    turns = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "4"}] * questions
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"id": "x", "messages": turns, "accepted": accepted}) + "\n"
    )
    return Messages(tmp_path / "a.jsonl")[0]


def test_accepted_answers_go_with_the_question_that_a_chat_asks(tmp_path):
    (question, expected, _), *rest = question_samples(chats(tmp_path, ["4", "four"]))
    assert (question.metadata, expected, rest) == ({"accepted": ["4", "four"]}, "4", [])


@pytest.mark.parametrize(
    ("accepted", "questions", "message"),
    [
        ("4", 1, "accepted is 4, expected a list"),
        ([], 1, "expected a list"),
        ([4], 1, "a list"),
        (["4"], 2, "and 2 questions"),
    ],
)
def test_accepted_answers_of_another_form_or_of_several_questions_are_errors(
    accepted, questions, message, tmp_path
):
    with pytest.raises(DataError, match=message):
        question_samples(chats(tmp_path, accepted, questions))


def asked_in(name):
    records = [json.loads(line) for line in (EVERYDAY / name).read_text().splitlines()]
    return [
        " ".join(record["messages"][0]["content"].casefold().split()) for record in records
    ], records


def test_no_everyday_question_that_is_evaluated_is_trained_on():
    asked, records = asked_in("asked.jsonl")
    trained, _ = asked_in("trained.jsonl")
    assert len(set(asked)) == len(asked) >= 60
    assert len(set(trained)) == len(trained) >= 100
    assert not set(asked) & set(trained)
    assert all(
        holds_answer(record["messages"][1]["content"], record["accepted"]) for record in records
    )
    # no question gives its answer away
    assert not [q for q, r in zip(asked, records) if holds_answer(q, r["accepted"])]


def test_the_everyday_files_are_those_of_the_candidates():
    questions = json.loads((REPO / "experiments" / "smollm2" / "questions.json").read_text())
    candidates = {
        question: accepted
        for facts in questions["asked"].values()
        for question, accepted in facts.items()
    }
    _, asked = asked_in("asked.jsonl")
    assert all(
        candidates[record["messages"][0]["content"]] == record["accepted"] for record in asked
    )
    prompts = {
        wording.format(s) for wording, subjects in questions["trained"].items() for s in subjects
    }
    assert {record["messages"][0]["content"] for record in asked_in("trained.jsonl")[1]} <= prompts
    assert not prompts & set(candidates)
