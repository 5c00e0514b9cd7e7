"""`owlfuse ablate`: what is left of the grid is trained, and the report is written.

runs/<name>/ holds ablation.json (what was asked for), a run for each cell, `report/`, and `old/`
for runs that were put aside.
"""

from __future__ import annotations

import fcntl
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from owlfuse.config.folders import find_folders
from owlfuse.config.identity import differing_hash
from owlfuse.config.messages import check_name, naming
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, hint
from owlfuse.core.files import read_json_if_there
from owlfuse.studies.ablation import launch, progress
from owlfuse.studies.ablation.file import Ablation, is_list, read_ablation
from owlfuse.studies.ablation.grid import Cell, full_metrics, make_cells, record_of, sources_of
from owlfuse.studies.ablation.page import write_report

OWN = {
    "jobs": "cells at a time; by default 1",
    "launcher": (
        "what starts them: `basic`, `joblib`, `submitit_local` or `submitit_slurm`; "
        "`launcher.<key>=` are its settings"
    ),
    "seeds": "in the place of the file's, as `seeds=[0,1]`",
    "dry_run": "`true`: print the cells and an estimate, and train nothing",
    "anew": "`true`: put runs that are there into `old/`, and begin again",
    "name": "of the folder, `runs/<name>`; by default the ablation's",
}
"""The command's own settings and what they mean."""


def ablate_command(name: str, words: list[str]) -> None:
    """Checks every cell, trains those that are not finished, and writes the report.

    Args:
        words: overrides of all cells; jobs=, launcher=, launcher.<key>=, seeds=, dry_run=, anew=,
            name=.

    Raises:
        ConfigError: a mistake in any cell, or runs of other code or another configuration in the
            folder.
        DataError: what is wrong with the data; cells that failed, at the end.
        KeyboardInterrupt: after Ctrl-C; the same command goes on.
    """
    folders = find_folders()
    file = folders.ablation(name)
    if file is None:
        raise ConfigError(
            f"{COMMAND_LINE}: ablate {name}: no such ablation{hint(name, folders.ablation_names)}"
        )
    own, words = split_words(words)
    check_name(f"{COMMAND_LINE}: name", str(own.get("name", name)))
    ablation = read_ablation(name, file)
    ablation.seeds = own.get("seeds", ablation.seeds)
    jobs = own.get("jobs", 1)
    launcher = own.get("launcher", "joblib" if jobs > 1 else "basic")
    settings = [word.removeprefix("launcher.") for word in words if word.startswith("launcher.")]
    launch.check_launcher(launcher, jobs, settings)
    words = [word for word in words if not word.startswith("launcher.")]
    cells = make_cells(
        ablation, words, str(own.get("name", name)), open_data=not own.get("dry_run")
    )
    folder = Path(cells[0].config.runs).expanduser() / cells[0].config.experiment
    metrics = full_metrics(ablation.metrics, sources_of(cells))
    if not own.get("dry_run") and launcher != "submitit_slurm":  # which trains on other machines
        check_machines(cells)
    left = unfinished(folder, cells, anew=own.get("anew", False) and not own.get("dry_run"))
    progress.print_plan(ablation, folder, cells, left, jobs)
    if own.get("dry_run"):
        return
    with only_one(folder):
        launch_all(ablation, folder, cells, left, metrics, (launcher, jobs, settings), words)
    failed = write_report(folder)
    if launch.presses(folder):
        raise KeyboardInterrupt("stopped; the same command goes on")
    if failed:
        raise DataError(
            f"{len(failed)} cells failed ({', '.join(failed)}); the log of each is "
            f"{folder}/<cell>/log.txt"
        )


def check_machines(cells: list[Cell]) -> None:
    """Raises ConfigError for a cell whose accelerator or devices this machine does not have."""
    from owlfuse.training.machine_checks import check_machine

    for cell in cells:
        with naming(f"cell {cell.name}"):
            check_machine(cell.config)


def split_words(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The command's own settings, and overrides.

    Raises ConfigError for a value of the wrong kind.
    """
    import yaml

    kinds = {
        "jobs": int,
        "seeds": list,
        "dry_run": bool,
        "anew": bool,
        "launcher": str,
        "name": str,
    }
    own: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in OWN:
            continue
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        value = text if kinds[key] is str and text else value
        right = is_list(value, int) if key == "seeds" else isinstance(value, kinds[key])
        if not right or (key == "jobs" and (isinstance(value, bool) or value < 1)):
            expected = {
                "jobs": "a number from 1",
                "seeds": "[0,1]",
                "dry_run": "true or false",
                "anew": "true or false",
            }
            raise ConfigError(f"{COMMAND_LINE}: {word}: expected {expected.get(key, 'a name')}")
        own[key] = value
    return own, [word for word in words if word.partition("=")[0] not in OWN]


def unfinished(folder: Path, cells: list[Cell], anew: bool) -> list[Cell]:
    """Those without results of this code and configuration.

    Raises:
        ConfigError: runs in the folder are of other code, configuration or data, unless `anew`,
            which puts them aside.
    """
    others = {
        cell.key: other
        for cell in cells
        if (
            other := differs(
                folder / cell.key, cell.hash, bool(cell.config.get("accept_changed_data"))
            )
        )
    }
    if others and not anew:
        first, what = next(iter(others.items()))
        raise ConfigError(
            f"{folder}: {len(others)} of {len(cells)} runs are of {what} "
            f"({first}{', ...' if len(others) > 1 else ''}); "
            "they are not mixed: name=<another> begins a folder of its own, anew=true puts them "
            "aside and runs them again"
        )
    for key in others:
        launch.put_aside(folder, key)
    return [cell for cell in cells if not (folder / cell.key / "results.json").exists()]


def differs(run: Path, hashes: dict[str, str], accept_changed_data: bool = False) -> str | None:
    """In what a run's code, configuration or data are not those of `hashes`; None where there is
    no run, or where they are."""
    found = read_json_if_there(run / "results.json").get("hash")
    if found is None and (run / "config.yaml").exists():  # not finished
        found = read_json_if_there(run / launch.STATE).get("hash")
    if found is None:
        return "an older owlfuse, which left no hash" if (run / "results.json").exists() else None
    names = {
        "config": "another configuration",
        "code": "other code",
        "data": (
            "other data (files, pictures or weights have changed; accept_changed_data=true "
            "goes on with them)"
        ),
    }
    return names.get(differing_hash(found, hashes, accept_changed_data) or "")


def launch_all(
    ablation: Ablation,
    folder: Path,
    cells: list[Cell],
    left: list[Cell],
    metrics: dict[str, tuple[str, str]],
    how: tuple[str, int, list[str]],
    words: list[str],
) -> None:
    """Writes ablation.json, and trains the cells that are left and within the budget."""
    from owlfuse.core.files import write_json
    from owlfuse.planning.bench.report import machine

    record = record_of(cells, ablation, metrics)
    write_json(
        folder / "ablation.json", {**record, "words": words, "machine": machine(), "jobs": how[1]}
    )
    (folder / launch.STOP).unlink(missing_ok=True)
    within, used = [], 0
    for cell in left:
        used += cell.steps
        if ablation.steps is None or used <= ablation.steps:
            within.append(cell)
            continue
        (folder / cell.key).mkdir(exist_ok=True)
        state = {
            "hash": cell.hash,
            "state": "not begun",
            "error": f"the budget's {ablation.steps} steps were used up",
        }
        launch.write_state(folder / cell.key, state)
    deadline = time.time() + 60 * ablation.minutes if ablation.minutes else None
    launcher, jobs, settings = how
    with progress.shown(folder, cells, within, jobs), interrupts(folder):
        launch.launch(folder, [cell.key for cell in within], launcher, jobs, settings, deadline)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises DataError while another process runs the ablation."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder} is being run by another process; wait for it, or give another name="
            ) from None
        yield


@contextmanager
def interrupts(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM are noted for the tasks: once stops after a step, twice at once, and a
    third time leaves."""

    def note(number: int, frame: Any) -> None:
        if launch.presses(folder) >= 2:
            raise KeyboardInterrupt
        launch.press(folder)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
