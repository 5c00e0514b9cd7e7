"""`owlfuse ablate` on a real grid, each run a process:

Ctrl-C, going on, a cell that fails, other code, a budget.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.studies.ablation.report import report_command
from owlfuse.studies.ablation.run import ablate_command

SMALL = [
    *TINY_SHAPES,
    "data.workers=0",
    "data.global_batch_size=4",
    "data.validation_samples=4",
    "evaluation.max_questions=2",
    "evaluation.max_new_tokens=2",
    "evaluation.contact_sheet=0",
    "evaluation.decode_tokens=4",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=30",
    "optim.warmup_steps=0",
]
GRID = f"""
base: shapes_owl3
overrides: {json.dumps(SMALL)}
factors:
  evaluation:
    plain: []
    faulty: [evaluation._target_=faulty.Evaluation]
seeds: [0, 1]
metrics: [val/exact_match, val/loss]
"""
FAULTY = """
from owlfuse.evaluation import validation

class Evaluation(validation.Evaluation):
    def __call__(self, model, data, *words, **options):
        if data.seed == 1:
            raise RuntimeError("no luck with <seed> 1")
        return super().__call__(model, data, *words, **options)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        Path("experiments/grid").mkdir(parents=True)
        Path("experiments/grid/ablation.yaml").write_text(GRID)
        Path("faulty.py").write_text(FAULTY)
        yield path


def start(*words):
    command = [sys.executable, "-m", "owlfuse", "ablate", "grid", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def read(*names, name="grid"):
    path = Path("runs", name, *names)
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def stopped(folder):
    """After Ctrl-C in the middle of the second run."""
    process = start()
    deadline = time.monotonic() + 900
    while (
        time.monotonic() < deadline
        and not read("plain-seed1", "progress.json")
        and process.poll() is None
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130, output
    return output


@pytest.mark.slow
def test_ctrl_c_ends_the_run_after_its_step_and_leaves_a_checkpoint(stopped):
    assert "1/4 plain-seed0: finished" in stopped
    assert "2/4 plain-seed1: interrupted" in stopped
    # no further cell was begun
    assert "faulty" not in stopped.partition("plain-seed0: began")[2].partition("grid")[0]
    assert (
        read("plain-seed0", "cell.json")["state"],
        read("plain-seed1", "cell.json")["state"],
    ) == ("finished", "interrupted")
    assert 0 < read("plain-seed1", "progress.json")["step"] < 30
    assert list(Path("runs/grid/plain-seed1/checkpoints").glob("step_*.ckpt"))
    log = Path("runs/grid/plain-seed1/log.txt").read_text()
    assert log.count("stopping after this step") == 1  # Ctrl-C reached it once
    assert not Path("runs/grid/plain-seed1/results.json").exists()


@pytest.mark.slow
def test_results_say_what_the_run_cost_and_what_it_is_of(stopped):
    results = read("plain-seed0", "results.json")
    cost = results["cost"]
    assert cost["trained_parameters"] == cost["parameters"] > 1e6
    assert cost["tokens_per_s"] > 0
    # weights, gradients and an optimizer's state at least
    assert cost["peak_memory_bytes"] > 4 * 3 * cost["parameters"]
    assert cost["ms_per_generated_token"] > 0
    assert read("plain-seed0", "cell.json")["hash"].items() <= results["hash"].items()
    assert (results["experiment"], results["seed"], results["steps"]) == ("grid", 0, 30)


@pytest.mark.slow
def test_a_report_of_what_is_finished_can_be_written_at_any_time(stopped, capsys):
    report_command("grid", [])
    shown = capsys.readouterr().out
    assert "plain-seed1: interrupted, at step" in shown
    assert "faulty-seed0: missing" in shown
    assert "1 of 4 runs are finished" in Path("runs/grid/report/index.html").read_text()


@pytest.fixture(scope="module")
def gone_on(stopped):
    """The same command again, in this process."""
    before = Path("runs/grid/plain-seed0/results.json").stat().st_mtime_ns
    with pytest.raises(
        DataError,
        match=r"1 cells failed \(faulty-seed1\); the log of each is runs/grid/<cell>/log.txt",
    ):
        ablate_command("grid", [])
    return before


@pytest.mark.slow
def test_the_same_command_goes_on_and_a_cell_that_fails_does_not_end_the_others(gone_on):
    # finished: skipped
    assert Path("runs/grid/plain-seed0/results.json").stat().st_mtime_ns == gone_on
    assert (
        "going on from runs/grid/plain-seed1/checkpoints/step_"
        in Path("runs/grid/plain-seed1/log.txt").read_text()
    )
    states = {
        key: read(key, "cell.json")["state"]
        for key in ("plain-seed1", "faulty-seed0", "faulty-seed1")
    }
    assert states == {
        "plain-seed1": "finished",
        "faulty-seed0": "finished",
        "faulty-seed1": "failed",
    }
    assert read("plain-seed1", "results.json")["steps"] == 30
    table = Path("runs/grid/report/table.md").read_text()
    assert "faulty-seed1: failed, RuntimeError: no luck with <seed> 1" in table
    assert "no luck with &lt;seed&gt; 1" in Path("runs/grid/report/index.html").read_text()
    assert "Traceback" in Path("runs/grid/faulty-seed1/log.txt").read_text()
    # the first seed of both learned the same, and differs in nothing
    assert (
        read("faulty-seed0", "results.json")["metrics"]
        == read("plain-seed0", "results.json")["metrics"]
    )
    assert "| faulty | 1 of 2 |" in table


@pytest.mark.slow
def test_runs_of_other_code_or_another_configuration_are_not_mixed_in(gone_on):
    with pytest.raises(
        ConfigError,
        match=r"grid: 4 of 4 runs are of another configuration \(plain-seed0, ...\); they",
    ):
        ablate_command("grid", ["optim.lr=0.5"])
    Path("faulty.py").write_text(FAULTY.replace("== 1", "== 5"))
    try:
        with pytest.raises(
            ConfigError,
            match=r"2 of 4 runs are of other code \(faulty-seed0, ...\); they are not mixed",
        ):
            ablate_command("grid", [])
    finally:
        Path("faulty.py").write_text(FAULTY)
    assert not Path("runs/grid/old").exists()
    # nothing was written by what was refused
    with pytest.raises(ConfigError, match="another configuration"):
        ablate_command("grid", ["optim.lr=0.5", "dry_run=true"])


@pytest.mark.slow
def test_anew_puts_runs_of_other_code_aside_and_a_budget_lists_what_it_does_not_begin(
    gone_on, capsys
):
    file = Path("experiments/grid/ablation.yaml")
    file.write_text(GRID + "budget: {steps: 30}\n")
    Path("faulty.py").write_text(FAULTY.replace("== 1", "== 5"))
    try:
        ablate_command("grid", ["anew=true"])
    finally:
        file.write_text(GRID)
        Path("faulty.py").write_text(FAULTY)
    shown = capsys.readouterr().out
    assert "1/1 faulty-seed0: finished" in shown
    assert "faulty-seed1: not begun, the budget's 30 steps were used up" in shown
    assert len(list(Path("runs/grid/old").glob("faulty-seed?.*/config.yaml"))) == 2
    assert (
        read("faulty-seed0", "results.json")["hash"]["code"]
        != read("plain-seed0", "results.json")["hash"]["code"]
    )


@pytest.mark.slow
def test_a_cell_of_two_processes_trains_goes_on_and_leaves_its_result(folder):
    words = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    words += ["trainer.devices=2", "seeds=[0]", "name=two", "trainer.max_steps=80"]
    words += ["model/vision=convnet_group_norm"]
    process = start(*words)
    deadline = time.monotonic() + 600
    while (
        time.monotonic() < deadline
        and read("plain-seed0", "progress.json", name="two").get("step", 0) < 2
        and process.poll() is None
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130, output
    output, _ = start(*words).communicate(timeout=600)
    assert read("plain-seed0", "results.json", name="two").get("steps") == 80, output
    assert read("plain-seed0", "cell.json", name="two")["first_step"] > 0


@pytest.mark.slow
def test_several_jobs_train_the_same(gone_on):
    words, name = ["jobs=2"], "by2"
    process = start(
        *words,
        f"name={name}",
        "evaluation._target_=owlfuse.evaluation.validation.Evaluation",
        "seeds=[0]",
        "data.seed=0",
    )
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output  # both cells are the same now
    assert "its configuration is that of cell plain" in output
    process = start(*words, f"name={name}")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    assert "faulty-seed1" in output.splitlines()[-1]
    for key in ("plain-seed0", "plain-seed1", "faulty-seed0"):
        ours, theirs = (
            json.loads(Path("runs", at, key, "results.json").read_text())["metrics"]
            for at in (name, "grid")
        )
        assert ours == pytest.approx(theirs, abs=1e-6)
