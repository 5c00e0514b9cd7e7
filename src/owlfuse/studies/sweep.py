"""`owlfuse train -m`: a run of every combination of listed values, and a table of their metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from owlfuse.artifacts.runs import metrics_of
from owlfuse.config import compose
from owlfuse.config.messages import naming
from owlfuse.core.console import PlainConsole as Console


def sweep(overrides: list[str]) -> None:
    """Every cell is composed and checked before the first trains; the table stands at the end, also
    after a failure.

    A run that starts processes is a command of its own, with its own port and process group. Under
    torchrun or SLURM the processes are there and train every run one after the other.
    """
    cells = compose.sweep_cells(overrides)
    composed = [compose.compose(cell) for cell in cells]
    from owlfuse.planning.tables import dry_run
    from owlfuse.training import train  # imports torch; a mistake is told before
    from owlfuse.training.machine_checks import check_machine

    for cell, configuration in zip(cells, composed, strict=True):
        if not configuration.get("dry_run"):
            with naming(" ".join(cell)):
                check_machine(configuration)

    rows: list[tuple[list[str], Path | None]] = []
    try:
        for cell, configuration in zip(cells, composed, strict=True):
            if configuration.get("dry_run"):
                dry_run(configuration)
                rows.append((cell, None))
            elif starts_processes(configuration):
                rows.append((cell, by_itself(cell, configuration)))
            else:
                rows.append((cell, train.run(configuration)))
    finally:
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
            print_table(rows, len(cells))


def starts_processes(configuration: DictConfig) -> bool:
    """Whether the run's Trainer may start more processes: each of them would run this whole
    sweep."""
    there = any(name in os.environ for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    trainer = configuration.get("trainer", {})
    return not there and (
        trainer.get("strategy", "auto") != "auto" or trainer.get("devices", 1) not in (1, "1")
    )


def by_itself(cell: list[str], configuration: DictConfig) -> Path:
    """Trains a cell by a command of its own, which gets the signals that this one gets, and returns
    the run's folder.

    Raises:
        ConfigError: a name that is taken.
        SystemExit: with the command's exit code; it has told its error.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint left in the run.
    """
    from owlfuse.artifacts.runs import run_folder

    folder = run_folder(configuration)
    named = [] if configuration.get("name") else [f"name={folder.name}"]
    command = [sys.executable, "-m", "owlfuse", "train", *cell, *named]
    with subprocess.Popen(command, process_group=0) as process:
        before = {
            n: signal.signal(n, lambda n, _: os.killpg(process.pid, n))
            for n in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code == 130:
        raise KeyboardInterrupt(
            "stopped; the line above says how this run of the sweep goes on, and the others are "
            "not begun"
        )
    if code:
        raise SystemExit(code if code > 0 else 1)
    return folder


def print_table(rows: list[tuple[list[str], Path | None]], cells: int) -> None:
    """One line a run, what differs between them in front."""
    metrics = [metrics_of(folder) for _, folder in rows]
    names = list(dict.fromkeys(name for row in metrics for name in row))
    shared = set.intersection(*(set(cell) for cell, _ in rows)) if len(rows) > 1 else set()
    table = Table(
        "overrides",
        "run",
        *names,
        title=f"{len(rows)} of {cells} runs",
        caption=" ".join(sorted(shared)),
    )
    for (cell, folder), row in zip(rows, metrics, strict=True):
        own = " ".join(o for o in cell if o not in shared)
        table.add_row(own, str(folder or ""), *(f"{row[n]:.4g}" if n in row else "" for n in names))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
