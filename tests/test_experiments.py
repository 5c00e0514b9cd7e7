"""The experiments as users run them, minutes each: what they must reach on unseen pictures."""

import json
import subprocess
import sys

import pytest

from looks import HEADER, half, looks_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["shapes_owl1", "shapes_owl2", "shapes_owl3"])
def trained(request, tmp_path_factory):
    """The run of an experiment; its training takes minutes, so that all tests share it."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "owlfuse", "train", f"experiment={request.param}", "name=slow"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "runs" / request.param / "slow"


def test_an_experiment_learns_to_answer_from_the_picture_and_keeps_its_text_tasks(trained):
    metrics = json.loads((trained / "results.json").read_text())["metrics"]
    assert metrics["val/exact_match"] >= 0.80
    assert metrics["val/exact_match"] >= metrics["val/exact_match_blank"] + 0.35
    assert metrics["text/exact_match"] >= 0.90


def test_color_questions_look_more_at_the_asked_shape_than_at_the_others(trained):
    looks = looks_of(trained, pictures=200)
    print(f"\n{HEADER}\n{looks.row(trained.parent.name)}")
    more = looks.asked - looks.others
    assert more.mean() - half(more) > 0
    assert looks.asked.mean() > 1.5 * looks.others.mean()  # before training it is 1.0
