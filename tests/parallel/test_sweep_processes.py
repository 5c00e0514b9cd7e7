"""A sweep whose runs are trained by two processes each."""

import json
import os
import subprocess
import sys

import pytest
from test_parallel import OWL3, SMALL, TWO

from helpers import SHAPE_COUNTS
from owlfuse.data.shapes.write import write_shapes

SWEEP = [*SMALL, *OWL3, *TWO, "data.global_batch_size=8", "trainer.max_steps=2", "seed=1,2"]
COMMAND = ["-m", "owlfuse", "train", "-m", *SWEEP]


def output_of(words, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def check(folder, output):
    """Both runs are whole, each written by its first rank alone, and with its own seed."""
    assert "2 of 2 runs" in output
    assert output.count("everything of this run is in") == 2
    results = [
        json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*/*/results.json"))
    ]
    assert sorted(result["seed"] for result in results) == [1, 2]
    assert [result["steps"] for result in results] == [2, 2]
    assert len(list((folder / "runs").glob("*/*"))) == 2


@pytest.mark.slow
def test_each_run_of_a_sweep_starts_its_own_two_processes(tmp_path):
    write_shapes(tmp_path / "data" / "shapes", **SHAPE_COUNTS)
    check(tmp_path, output_of([*COMMAND, "trainer=ddp"], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_processes_of_torchrun_train_each_run_of_a_sweep(tmp_path, kind):
    write_shapes(tmp_path / "data" / "shapes", **SHAPE_COUNTS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    check(tmp_path, output_of([*torchrun, *COMMAND, f"trainer={kind}"], tmp_path))
