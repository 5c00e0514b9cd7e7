"""Runs by several real processes, for tests: `python ranks.py RUNS.json` under torchrun trains one
after the other, so that processes start once and not for every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SLOW_WRITES = "slow writes"
"""Among the overrides: what is written in the background is written a second later, when
training has gone on."""


def train_all(path: Path) -> None:
    """Trains each of the runs in the file, lists of overrides, and keeps the ids of the samples
    that this rank trained on."""
    torch.set_num_threads(1)
    from torch.distributed.checkpoint import FileSystemWriter

    from owlfuse.config.compose import compose
    from owlfuse.training import train

    write_data = FileSystemWriter.write_data
    for overrides in json.loads(path.read_text()):
        with pytest.MonkeyPatch.context() as patch:
            if SLOW_WRITES in overrides:
                patch.setattr(
                    FileSystemWriter,
                    "write_data",
                    lambda *words: (time.sleep(1), write_data(*words))[1],
                )
            seen = record_samples(patch)
            run = train.run(compose([word for word in overrides if word != SLOW_WRITES]))
            ids = gathered(seen)
            if os.environ.get("RANK", "0") == "0":
                (Path(run) / "samples.json").write_text(json.dumps(ids))


def record_samples(patch: pytest.MonkeyPatch) -> list[str]:
    """A list that the id of each training sample is put into when it is loaded by this process."""
    from owlfuse.data.datamodule import ChatData

    seen: list[str] = []
    load = ChatData.load

    def recorded(data, sample, source, **options):
        if any(source is one for one in data.sources.values()):
            seen.append(f"{sample.source}:{sample.id}")
        return load(data, sample, source, **options)

    patch.setattr(ChatData, "load", recorded)
    return seen


def gathered(seen: list[str]) -> list[list[str]]:
    """The lists of all ranks."""
    if not torch.distributed.is_initialized():
        return [seen]
    lists: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, seen)
    return lists


def by_processes(
    count: int, runs: list[list[str]], folder: Path, name: str, timeout: float = 1200
) -> None:
    """Trains the runs by `count` processes of torchrun, in `folder`.

    AssertionError: one failed, with its output.
    """
    path = folder / f"{name}.json"
    path.write_text(json.dumps(runs))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(Path(__file__).resolve()), str(path)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
