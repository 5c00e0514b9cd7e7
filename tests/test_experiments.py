"""The experiments as users run them, minutes each: what they must reach on unseen pictures."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["shapes_owl1", "shapes_owl2", "shapes_owl3"])
def test_an_experiment_learns_to_answer_from_the_picture_and_keeps_its_text_tasks(
    experiment, tmp_path
):
    # on all cores: with the one thread of tests, sums are rounded otherwise than in a user's run
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "owlfuse", "train", f"experiment={experiment}", "name=slow"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    results = tmp_path / "runs" / experiment / "slow" / "results.json"
    metrics = json.loads(results.read_text())["metrics"]
    assert metrics["val/exact_match"] >= 0.80
    assert metrics["val/exact_match"] >= metrics["val/exact_match_blank"] + 0.35
    assert metrics["text/exact_match"] >= 0.90
