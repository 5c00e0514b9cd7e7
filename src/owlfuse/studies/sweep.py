"""`owlfuse train -m`: a run of every combination of listed values, and a table of their metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from owlfuse.config import compose
from owlfuse.config.messages import naming
from owlfuse.core.console import show
from owlfuse.core.environment import RANK_VARIABLES, is_launched
from owlfuse.core.errors import ConfigError
from owlfuse.core.signals import ending_signals, leave_closed_terminal, signals_handled


def sweep(overrides: list[str]) -> None:
    """Trains every cell; each is composed and checked before the first one trains. The table
    stands at the end, also after a failure.

    A run that starts processes is a command of its own, with its own port and process group. Under
    torchrun or SLURM the processes exist and train every run one after the other.
    """
    cells = compose.sweep_cells(overrides)
    configs = [compose.compose(cell) for cell in cells]
    # These import torch: a mistake is reported before.
    from owlfuse.planning.tables import dry_run
    from owlfuse.training import train

    check_runs(cells, configs)

    runs: list[tuple[list[str], Path | None]] = []
    try:
        for cell, config in zip(cells, configs, strict=True):
            run: Path | None = None
            if config.get("dry_run"):
                dry_run(config)
            elif starts_processes(config):
                run = train_in_process(cell, config)
            else:
                run = train.run(config)
            runs.append((cell, run))
    finally:
        # Under torchrun or SLURM every rank is here, and one prints.
        ranks = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
        if not ranks or ranks[0] == "0":
            print_table(runs, len(cells))


def check_runs(cells: list[list[str]], configs: Sequence[DictConfig]) -> None:
    """Raises ConfigError where this machine does not have a run's devices, two runs would have one
    folder, or one would write over a run."""
    from owlfuse.artifacts.runs import check_not_there, run_folder
    from owlfuse.training.machine_checks import check_machine

    folders: set[Path] = set()
    for cell, config in zip(cells, configs, strict=True):
        if config.get("dry_run"):
            continue
        with naming(" ".join(cell)):
            check_machine(config)
            # Without a name the time is it.
            if not config.get("name"):
                continue
            folder = run_folder(config)
            check_not_there(folder)
            if folder in folders:
                raise ConfigError(
                    f"name: an earlier run of the sweep has the folder {folder}, too; leave name= "
                    "out, and each is named by its time"
                )
        folders.add(folder)


def starts_processes(config: DictConfig) -> bool:
    """Return whether the run's Trainer may start more processes: each of them would run this
    whole sweep."""
    # Of processes that were started by torchrun or SLURM none starts more.
    if is_launched():
        return False
    trainer = config.get("trainer", {})
    return trainer.get("strategy", "auto") != "auto" or trainer.get("devices", 1) not in (1, "1")


def train_in_process(cell: list[str], config: DictConfig) -> Path:
    """Trains a cell by a command of its own, which gets the signals that this one gets, and returns
    the run's folder.

    Raises:
        ConfigError: a name that is taken.
        SystemExit: with the command's exit code; it has reported its error.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint left in the run.
    """
    from owlfuse.artifacts.runs import run_folder

    # Named here, so that the folder is known when the command has ended.
    folder = run_folder(config)
    command = [sys.executable, "-m", "owlfuse", "train", *cell]
    if not config.get("name"):
        command.append(f"name={folder.name}")
    # A process group of its own: the terminal's Ctrl-C would reach it twice.
    with subprocess.Popen(command, process_group=0) as process:

        def forward(number: int, frame: Any) -> None:
            leave_closed_terminal()
            os.killpg(process.pid, number)

        with signals_handled(dict.fromkeys((signal.SIGINT, *ending_signals()), forward)):
            code = process.wait()
    if code == 130:
        raise KeyboardInterrupt(
            "stopped; the line above says how this run of the sweep goes on, and the others are "
            "not begun"
        )
    if code:
        raise SystemExit(code if code > 0 else 1)  # negative: ended by a signal
    return folder


def print_table(runs: list[tuple[list[str], Path | None]], cell_count: int) -> None:
    """Prints a line for each run with what differs between them in front, then their metrics."""
    import pandas as pd

    from owlfuse.artifacts.runs import metrics_of
    from owlfuse.planning.frames import terminal_table

    shared = set()
    # What all runs have in common stands below the table, once.
    if len(runs) > 1:
        shared = set.intersection(*(set(cell) for cell, _ in runs))
    records = []
    for cell, folder in runs:
        overrides = " ".join(word for word in cell if word not in shared)
        record = {"overrides": overrides, "run": str(folder or "")}
        record |= {name: f"{value:.4g}" for name, value in metrics_of(folder).items()}
        records.append(record)
    frame = pd.DataFrame(records, columns=None if records else ["overrides", "run"])
    title = f"{len(runs)} of {cell_count} runs"
    show(terminal_table(frame, title, text_columns=2, caption=" ".join(sorted(shared))))
