"""Two "machines" on one: groups of processes that know each other by an address alone, started
by the script for torchrun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_parallel import OWL3, SMALL

from helpers import SHAPE_COUNTS
from owlfuse.config.compose import compose
from owlfuse.data.shapes.write import write_shapes
from owlfuse.training import train

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "many_gpus" / "torchrun.sh"


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does_and_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shapes("data/shapes", **SHAPE_COUNTS)
    common = [*SMALL, *OWL3, "data.global_batch_size=8", "trainer.max_steps=4"]
    train.run(compose([*common, "name=alone"]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shared = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "NODES": "2",
        "GPUS": "1",
        "PORT": str(port),
    }
    overrides = [*common, "trainer=fsdp", "trainer.accelerator=cpu", "name=nodes"]
    nodes = [
        subprocess.Popen(
            [SCRIPT, *overrides],
            env={**shared, "NODE": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=600)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "".join(said)[-4000:]
    alone, together = (
        json.loads(Path(f"runs/shapes_owl3/{name}/results.json").read_text())
        for name in ("alone", "nodes")
    )
    assert together["metrics"]["val/loss"] == pytest.approx(alone["metrics"]["val/loss"], abs=1e-4)
    assert "everything of this run" in said[0]
    assert "everything of this run" not in said[1]
