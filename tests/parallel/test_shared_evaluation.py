"""Evaluations and validations that two ranks share give what one process gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_parallel import OWL3, SMALL, SPLIT, TWO, column

from helpers import SHAPE_COUNTS
from owlfuse.config.compose import compose
from owlfuse.data.shapes.write import write_shapes
from owlfuse.training import train
from ranks import by_processes

pytestmark = pytest.mark.slow

COUNTS = {**SHAPE_COUNTS, "val_pictures": 7, "held_out_pictures": 3, "text_val": 70}
"""Of the text there are three batches in a validation during training, of the others one: two
ranks divide neither."""
RUN = [
    *(word for word in SMALL if not word.startswith("+data.prepare")),
    *(f"+data.prepare.{name}={count}" for name, count in COUNTS.items()),
    *OWL3,
    "data.global_batch_size=8",
    "data.pack_to=512",
    "data.validation_samples=70",
    "data.validation.val.on_error=skip",
    "trainer.max_steps=2",
    "trainer.val_check_interval=1",
    # so little that the weights of several processes stay those of one
    "optim.lr=1e-7",
    "evaluation.before=true",
    "evaluation.batch_size=4",
    # three batches of a source
    "evaluation.max_questions=9",
    "evaluation.max_new_tokens=3",
    "evaluation.decode_tokens=2",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
WRONG = "data/shapes/images/val/000003.png"
"""A picture that is none."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of one process and of two lie once they are done."""
    path = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **COUNTS)
        Path(WRONG).write_bytes(b"no picture")
        train.run(compose([*RUN, "name=alone"]))
        by_processes(
            2,
            [[*RUN, *trainer, f"name={split}"] for split, (trainer, _) in SPLIT.items()],
            path,
            "together",
        )
    return path


def run_of(folder, name):
    return folder / "runs" / "shapes_owl3" / name


def content(folder, name, file):
    return json.loads((run_of(folder, name) / file).read_text())


def answers(folder, name, file):
    """The answers of a run, which are more than one process could answer in one batch."""
    lines = (run_of(folder, name) / file).read_text().splitlines()
    assert len(lines) > 20
    return [json.loads(line) for line in lines]


def assert_near(metrics, expected, near):
    """Hold that metrics are near others, perplexities by their size: they are exponentials of
    losses, so what is near for a loss is near for them by their size."""
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        limits = {"rel": near} if "perplexity" in name else {"rel": 0, "abs": near}
        assert metrics[name] == pytest.approx(value, **limits), name


@pytest.mark.parametrize("split", SPLIT)
def test_answers_and_metrics_are_those_of_one_process(folder, split):
    # tensor ranks add up parts of each product: other last bits
    near = 1e-5 if split == "tp" else 1e-6
    for file in ("answers_before.jsonl", "answers.jsonl"):
        assert answers(folder, split, file) == answers(folder, "alone", file)
    alone, together = (content(folder, name, "results.json") for name in ("alone", split))
    assert together["questions"] == alone["questions"]
    assert_near(together["metrics"], alone["metrics"], near)
    before = [content(folder, name, "before.json") for name in ("alone", split)]
    if split == "tp":
        assert_near(before[1], before[0], near)
    else:
        assert before[1] == before[0]


@pytest.mark.parametrize("split", SPLIT)
def test_validation_losses_and_what_was_left_out_are_those_of_one_process(folder, split):
    near = 1e-5 if split == "tp" else 1e-6
    for metric in ("val/loss", "val_held_out/loss", "text/loss"):
        losses = column(run_of(folder, "alone"), metric)
        assert len(losses) == 2
        assert column(run_of(folder, split), metric) == pytest.approx(losses, abs=near)
    alone, together = (content(folder, name, "mixture.json") for name in ("alone", split))
    assert together["validation"] == alone["validation"]
    assert together["validation"]["sources"]["val"]["skipped"] == 1
    assert "cannot be read" in together["validation"]["skipped"][0]["reason"]


def test_what_is_left_out_is_logged_once(folder):
    log = (folder / "together.log").read_text()
    # before the training, in its first validation and after it, of three runs
    assert log.count("skipped val:3 of validation source val") == 9


def test_a_run_is_evaluated_again_by_the_processes_of_torchrun(folder):
    shutil.copytree(run_of(folder, "alone"), run_of(folder, "again"))
    torchrun = [*TORCHRUN, "--nproc_per_node=2", "--module", "owlfuse"]
    subprocess.run(
        [sys.executable, *torchrun, "eval", "runs/shapes_owl3/again"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=True,
    )
    answered = [answers(folder, name, "answers.jsonl") for name in ("alone", "again")]
    assert answered[1] == answered[0]
    alone, again = (content(folder, name, "results.json") for name in ("alone", "again"))
    assert again["metrics"] == alone["metrics"]


@pytest.mark.parametrize("split", ["ddp", "fsdp"])
def test_a_rank_that_fails_in_an_evaluation_ends_the_other_in_a_line(folder, split):
    words = [word for word in RUN if not word.startswith("data.validation.val.on_error")]
    trainer, _ = SPLIT[split]
    # the picture is in the second batch, which is the second rank's
    words += [*trainer, *TWO, "evaluation.batch_size=2", f"name=fails-{split}"]
    done = subprocess.run(
        [sys.executable, "-m", "owlfuse", "train", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    output = done.stdout + done.stderr
    # Lightning watches the second rank, and may end the first one before it says its line
    by_lightning = done.returncode == -signal.SIGKILL and "Child process" in output
    assert done.returncode == 1 or by_lightning, output[-4000:]
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if "error: " in line]
    assert all("000003.png" in line and "cannot be read" in line for line in errors)
    assert any("error: sample val:" in line for line in errors)
    if not by_lightning:
        assert any("error: rank 1 has failed: sample val:" in line for line in errors), errors
