"""Runs by several real processes, for tests: `python ranks.py RUNS.json` under torchrun trains one after the other, so that
processes start once and not for every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def train_all(path: Path) -> None:
    """Trains each of the runs in the file, lists of overrides."""
    torch.set_num_threads(1)
    from owlfuse import train
    from owlfuse.config import compose

    for overrides in json.loads(path.read_text()):
        train.run(compose(overrides))


def by_processes(count: int, runs: list[list[str]], folder: Path, name: str, timeout: float = 600) -> None:
    """Trains the runs by `count` processes of torchrun, in `folder`. AssertionError: one failed, with its output."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(Path(__file__).resolve()), str(path)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
