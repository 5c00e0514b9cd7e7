"""Cells through Hydra's multirun: one after another, by joblib, or by submitit.

Each is a process that a task watches.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint
from owlfuse.core.files import read_json, write_json
from owlfuse.studies.ablation.file import written

LAUNCHERS = {
    "basic": "basic",
    "joblib": "joblib",
    "submitit_local": "submitit_local",
    "submitit_slurm": "submitit_slurm",
}
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}
PLUGINS["submitit_slurm"] = PLUGINS["submitit_local"]
STATE = "cell.json"
"""Of a cell's folder: its state (running, finished, failed, interrupted, not begun), hash, times
and error."""
STOP = ".stop"
"""Of the ablation's folder: how often Ctrl-C was pressed.

Tasks on other processes and machines read it.
"""


def check_launcher(launcher: str, jobs: int, settings: list[str]) -> None:
    """Raises ConfigError: a launcher that there is not, that is not installed, or that has no
    such setting."""
    if launcher not in LAUNCHERS:
        raise ConfigError(
            f"{COMMAND_LINE}: launcher={launcher}: no such launcher{hint(launcher, LAUNCHERS)}"
        )
    if launcher == "basic" and jobs > 1:
        raise ConfigError(
            f"{COMMAND_LINE}: jobs={jobs}: the basic launcher runs one cell after another; add "
            "launcher=joblib"
        )
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    if launcher in PLUGINS and not installed(PLUGINS[launcher]):
        raise ConfigError(
            f"{COMMAND_LINE}: launcher={launcher}: not installed; pip install 'owlfuse[sweep]'"
        )
    Plugins.instance()  # finds the launchers that are installed
    keys = [
        key
        for key in ConfigStore.instance().load(f"hydra/launcher/{launcher}.yaml").node
        if key != "_target_"
    ]
    for key in (setting.partition("=")[0] for setting in settings):
        if key.partition(".")[0] not in keys:
            raise ConfigError(
                f"{COMMAND_LINE}: launcher.{key}: no such setting of the launcher "
                f"{launcher}{hint(key, map(str, keys), 30)}"
            )


def installed(plugin: str) -> bool:
    """Whether a package of Hydra's plugins is there."""
    with suppress(ModuleNotFoundError):
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    return False


def launch(
    folder: Path,
    keys: list[str],
    launcher: str,
    jobs: int,
    settings: list[str],
    deadline: float | None,
) -> None:
    """Runs the cells; returns when all have ended in some way, also after Ctrl-C.

    Args:
        settings: overrides of `hydra.launcher`, without that prefix.
        deadline: seconds since 1970 after which no cell is begun.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    if not keys:
        return
    node = {"cell": None, "folder": None, "deadline": None, "threads": None}
    ConfigStore.instance().store(name="owlfuse_cell", node=node)
    threads = (
        max(1, (os.cpu_count() or 1) // jobs)
        if jobs > 1 and "OMP_NUM_THREADS" not in os.environ
        else None
    )
    words = [f"cell={','.join(quoted(key) for key in keys)}", f"folder={quoted(str(folder))}"]
    words += [f"deadline={written(deadline)}", f"threads={written(threads)}"]
    words += [
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
    ]
    words += [
        f"hydra.sweep.dir={quoted(str(folder))}",
        "hydra.sweep.subdir='.'",
        f"hydra/launcher={LAUNCHERS[launcher]}",
    ]
    words += (
        [f"hydra.launcher.n_jobs={jobs}", "hydra.launcher.batch_size=1"]
        if launcher == "joblib"
        else []
    )
    if launcher.startswith("submitit"):
        words += [f"hydra.launcher.submitit_folder={quoted(str(folder / '.submitit'))}"]
        words += (
            [f"hydra.launcher.array_parallelism={jobs}"] if launcher == "submitit_slurm" else []
        )
    words += [f"hydra.launcher.{word}" for word in settings]
    GlobalHydra.instance().clear()
    try:
        hydra = Hydra.create_main_hydra2("owlfuse", create_config_search_path(None))
        hydra.multirun("owlfuse_cell", run_cell, words, with_log_configuration=False)
    except Exception as error:
        if presses(folder):  # a worker that Ctrl-C reached too
            return
        if type(error).__module__.startswith("hydra.errors"):
            said = " ".join(f"launcher.{setting}" for setting in settings)
            raise ConfigError(f"{COMMAND_LINE}: {said}: {error}") from None
        raise
    finally:
        GlobalHydra.instance().clear()


def run_cell(config: DictConfig) -> str:
    """Hydra's task: trains one cell in a process, and returns its state, which its folder's
    cell.json holds too."""
    folder, key = Path(config.folder), config.cell
    run = folder / key
    hashes = next(
        cell["hash"] for cell in read_json(folder / "ablation.json")["cells"] if cell["key"] == key
    )
    state: dict[str, Any] = {"hash": hashes, "began": time.time()}
    if presses(folder):
        return "not begun"
    run.mkdir(parents=True, exist_ok=True)
    if config.deadline is not None and time.time() > config.deadline:
        return write_state(
            run, {**state, "state": "not begun", "error": "the budget's minutes were used up"}
        )
    if not any((run / "checkpoints").glob("*.ckpt")) and (run / "config.yaml").exists():
        put_aside(folder, key)  # it was stopped before its first checkpoint
        run.mkdir()
    write_state(run, {**state, "state": "running"})
    log = run / "log.txt"
    threads = {"OMP_NUM_THREADS": str(config.threads)} if config.threads else {}
    command = [
        sys.executable,
        "-m",
        "owlfuse.studies.ablation.cell",
        str(folder),
        key,
        str(os.getpid()),
    ]
    # its own session: the terminal's Ctrl-C reaches it through us, once
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **threads},
        )
    code = watch(process, folder)
    last = tidy(log)
    state["ended"] = time.time()
    if code == 0:
        return write_state(run, {**state, "state": "finished"})
    if code == 130 or presses(folder):
        return write_state(run, {**state, "state": "interrupted"})
    ended = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return write_state(
        run, {**state, "state": "failed", "error": last.removeprefix("owlfuse: error: ") or ended}
    )


def watch(process: subprocess.Popen, folder: Path) -> int:
    """Waits for the process, and hands each Ctrl-C on to it once. Its exit code."""
    sent = 0
    while (code := process.poll()) is None:
        try:
            time.sleep(0.1)
            wanted = presses(folder)
        # in a worker process, which the terminal reaches too; it is in STOP as well
        except KeyboardInterrupt:
            continue
        while sent < min(wanted, 2) and process.poll() is None:
            process.send_signal(signal.SIGINT)
            sent += 1
            time.sleep(0.1)
    return code


def presses(folder: Path) -> int:
    """How often Ctrl-C was pressed."""
    try:
        return len((folder / STOP).read_bytes())
    except OSError:
        return 0


def press(folder: Path) -> None:
    """Notes a Ctrl-C."""
    with (folder / STOP).open("ab") as file:
        file.write(b"x")


def tidy(log: Path) -> str:
    """Leaves of each line what a terminal would show at its end, progress bars written over
    themselves; the last line that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [
        re.sub(r"\x1b?\[[0-9;]*[A-Za-z]", "", line.rstrip("\r").rpartition("\r")[2]).rstrip()
        for line in lines
    ]
    lines = [line for line in lines if line]
    log.write_text("\n".join([*lines, ""]), encoding="utf-8")
    errors = [line for line in lines if line.startswith("owlfuse: error: ")]
    return (errors or lines or [""])[-1][:300]


def put_aside(folder: Path, key: str) -> None:
    """Moves a cell's folder into `old/`."""
    old = folder / "old"
    old.mkdir(exist_ok=True)
    (folder / key).rename(old / f"{key}.{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")


def write_state(run: Path, state: dict[str, Any]) -> str:
    """cell.json; returns the state's name."""
    write_json(run / STATE, state)
    return state["state"]


def quoted(text: str) -> str:
    """A string in Hydra's grammar."""
    return "'" + text.replace("'", "\\'") + "'"
