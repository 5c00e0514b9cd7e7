"""`owlfuse ablate`: trains what is left of the grid, and writes the report.

runs/<name>/ holds ablation.json (what was asked for), a run for each cell, `report/`, and `old/`
for runs that were put aside.
"""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from owlfuse.artifacts.runs import has_no_locks
from owlfuse.config.check import check_arguments
from owlfuse.config.folders import find_folders
from owlfuse.config.identity import differing_hash
from owlfuse.config.messages import check_name, naming, split_settings
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, hint
from owlfuse.core.files import read_json_if_there, write_json
from owlfuse.core.signals import signals_handled
from owlfuse.studies.ablation import launch, progress
from owlfuse.studies.ablation.file import Ablation, read_ablation
from owlfuse.studies.ablation.grid import (
    Cell,
    full_metrics,
    make_cells,
    make_record,
    validation_sources,
)
from owlfuse.studies.ablation.report import write_report
from owlfuse.studies.ablation.results import of_stopped_run

DIFFERENCES = {
    "config": "another configuration",
    "code": "other code",
    "data": "other data (files, pictures or weights have changed; accept_changed_data=true goes on "
    "with them)",
}
"""What a run is of, by the hash that differs from the cell's."""


@dataclass
class Options:
    """The command's own settings.

    Args:
        jobs: cells at a time.
        launcher: what starts them: `basic`, on this machine, or `submitit_slurm`; `launcher.<key>=`
            are its settings.
        seeds: in the place of the file's, as `seeds=[0,1]`.
        dry_run: print the cells and an estimate, and train nothing.
        anew: put runs that are there into `old/`, and begin again.
        name: of the folder, `runs/<name>`; null: the ablation's.
    """

    jobs: int = 1
    launcher: str = "basic"
    seeds: list[int] | None = None
    dry_run: bool = False
    anew: bool = False
    name: str | None = None
    launcher_settings: list[str] = field(init=False, default_factory=list)
    """`key=value` words, without the prefix `launcher.`."""


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
    options, words = split_words(words)
    runs_name = name if options.name is None else options.name
    check_name(f"{COMMAND_LINE}: name", runs_name)
    ablation = read_ablation(name, file)
    ablation.seeds = options.seeds or ablation.seeds
    launch.check_launcher(options.launcher, options.launcher_settings)
    if not options.dry_run:
        # A plan may be made on any machine.
        launch.check_cluster(options.launcher)
    # A dry run writes nothing, and data may be made when they are opened.
    cells = make_cells(ablation, words, runs_name, open_data=not options.dry_run)
    folder = Path(cells[0].config.runs).expanduser() / cells[0].config.experiment
    evaluation = str(cells[0].config.evaluation.get("_target_"))
    metrics = full_metrics(ablation.metrics, validation_sources(cells), evaluation)
    if options.dry_run:
        unfinished = find_unfinished(folder, cells, archive=False)
        progress.print_plan(ablation, folder, cells, unfinished, options.jobs)
        return

    if options.launcher != "submitit_slurm":  # it uses other machines
        from owlfuse.training.machine_checks import check_machine

        for cell in cells:
            with naming(f"cell {cell.name}"):
                check_machine(cell.config)
    # Before runs are put aside, which another process may be training.
    with run_lock(folder):
        unfinished = find_unfinished(folder, cells, archive=options.anew)
        progress.print_plan(ablation, folder, cells, unfinished, options.jobs)
        record = make_record(cells, ablation, metrics)
        launch_all(ablation, folder, {**record, "words": words}, unfinished, options)
    # Also of an ablation that was interrupted: what is finished counts.
    failed = write_report(folder)
    if launch.interrupt_count(folder):
        raise KeyboardInterrupt("stopped; the same command goes on")
    if failed:
        raise DataError(
            f"{len(failed)} cells failed ({', '.join(failed)}); the log of each is "
            f"{folder}/<cell>/log.txt"
        )


def split_words(words: list[str]) -> tuple[Options, list[str]]:
    """Return the command's own settings, and overrides.

    Raises ConfigError for a value of the wrong kind.
    """
    names = [setting.name for setting in fields(Options) if setting.init]
    texts, words = split_settings(words, names)
    settings: dict[str, Any] = {}
    for key, text in texts.items():
        # A name may look like a number.
        settings[key] = text if key in ("launcher", "name") else read_value(text)
    check_arguments(Options, "", "", settings, lambda key: COMMAND_LINE, builds=False)
    options = Options(**settings)
    if options.jobs < 1:
        raise ConfigError(f"{COMMAND_LINE}: jobs={options.jobs}: expected a number from 1")
    if options.seeds == []:
        raise ConfigError(f"{COMMAND_LINE}: seeds=[]: expected at least one, as [0,1]")
    overrides = []
    for word in words:
        if word.startswith("launcher."):
            options.launcher_settings.append(word.removeprefix("launcher."))
        else:
            overrides.append(word)
    return options, overrides


def read_value(text: str) -> Any:
    """Return the value of a text in YAML's notation, and the text where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def find_unfinished(folder: Path, cells: list[Cell], archive: bool) -> list[Cell]:
    """Return the cells without results of this code and configuration.

    Args:
        archive: whether runs of other code, configuration or data are put aside.

    Raises:
        ConfigError: there are such runs, and they are not to be put aside.
        DataError: one that is to be put aside is being trained.
    """
    differences = {}
    for cell in cells:
        difference = find_difference(folder / cell.key, cell)
        if difference is not None:
            differences[cell.key] = difference
    if differences and not archive:
        first, difference = next(iter(differences.items()))
        more = ", ..." if len(differences) > 1 else ""
        raise ConfigError(
            f"{folder}: {len(differences)} of {len(cells)} runs are of {difference} "
            f"({first}{more}); they are not mixed: name=<another> begins a folder of its own, "
            "anew=true puts them aside and runs them again"
        )
    for key in differences:
        if launch.is_locked(folder / key / ".lock"):
            raise DataError(
                f"{folder / key} is being trained by a process that an earlier command left; wait "
                "until it ends, or give another name="
            )
    for key in differences:
        launch.archive_run(folder, key)
    return [cell for cell in cells if not own_results(folder / cell.key, cell.steps)]


def own_results(run: Path, steps: int) -> dict[str, Any]:
    """Return the results of a cell that has ended; nothing of one that was stopped, also where it
    was evaluated then."""
    results = read_json_if_there(run / "results.json")
    state = read_json_if_there(run / launch.STATE_FILE)
    return {} if of_stopped_run(results, state, steps) else results


def find_difference(run: Path, cell: Cell) -> str | None:
    """Return in what a run's code, configuration or data are not those of the cell; None where
    there is no run, or where they are the same."""
    results = own_results(run, cell.steps)
    run_hashes = results.get("hash")
    # A run that is not finished has no results; its task wrote the hash.
    if run_hashes is None and (run / "config.yaml").exists():
        run_hashes = read_json_if_there(run / launch.STATE_FILE).get("hash")
    if run_hashes is None:
        return "an older owlfuse, which left no hash" if results else None
    kind = differing_hash(run_hashes, cell.hash, bool(cell.config.get("accept_changed_data")))
    return None if kind is None else DIFFERENCES[kind]


def launch_all(
    ablation: Ablation,
    folder: Path,
    record: dict[str, Any],
    unfinished: list[Cell],
    options: Options,
) -> None:
    """Writes ablation.json, and trains the unfinished cells that are within the budget."""
    # Jobs of a cluster do not share a machine.
    jobs = 1 if options.launcher == "submitit_slurm" else options.jobs
    record = {**record, "jobs": jobs}
    # Before any cell, which reads its overrides from the file.
    write_json(folder / "ablation.json", record)
    (folder / launch.STOP_FILE).unlink(missing_ok=True)  # of an earlier command
    to_train = within_budget(ablation, folder, unfinished)
    deadline = time.time() + 60 * ablation.minutes if ablation.minutes else None
    with progress.show_progress(folder, to_train), count_interrupts(folder):
        launch.launch(
            folder,
            [cell.key for cell in to_train],
            options.launcher,
            options.jobs,
            options.launcher_settings,
            deadline,
        )


def within_budget(ablation: Ablation, folder: Path, unfinished: list[Cell]) -> list[Cell]:
    """Return the first cells whose steps together are within the budget; the others get a state
    that says so."""
    to_train = []
    steps = 0
    for cell in unfinished:
        # Those that did not fit count too: no later, shorter cell takes the place of one.
        steps += cell.steps
        if ablation.steps is None or steps <= ablation.steps:
            to_train.append(cell)
            continue
        (folder / cell.key).mkdir(exist_ok=True)
        error = f"the budget's {ablation.steps} steps were used up"
        launch.write_state(folder / cell.key, {"hash": cell.hash}, "not begun", error=error)
    return to_train


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Raises DataError while another process runs the ablation."""
    folder.mkdir(parents=True, exist_ok=True)
    # The system releases a lock of a process that is killed.
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder} is being run by another process; wait for it, or give another name="
            ) from None
        except OSError as error:
            if not has_no_locks(folder / ".lock", error):
                raise
        yield


@contextmanager
def count_interrupts(folder: Path) -> Iterator[None]:
    """Records Ctrl-C and SIGTERM for the tasks: the first stops after a step, the second at once,
    and the third raises KeyboardInterrupt."""

    def record(number: int, frame: Any) -> None:
        # The tasks are beyond reach: leave without them.
        if launch.interrupt_count(folder) >= 2:
            raise KeyboardInterrupt
        launch.record_interrupt(folder)

    with signals_handled({signal.SIGINT: record, signal.SIGTERM: record}):
        yield
