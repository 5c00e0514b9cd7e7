"""Starts the cells of an ablation: on this machine, or on a cluster by submitit.

Each cell is a process of its own that a task watches. Tasks run in threads, in other processes or
on other machines, so that they and the command speak through files of the ablation's folder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from owlfuse.artifacts.runs import checkpoints_of, step_of
from owlfuse.core.environment import machine
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint
from owlfuse.core.files import read_json, read_json_if_there, write_json

LAUNCHERS = ("basic", "submitit_slurm")
"""`basic`: processes of this machine."""
COMMON_SETTINGS = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)
"""Settings of submitit that do not depend on the cluster."""
SLURM_SETTINGS = (
    "partition",
    "qos",
    "comment",
    "constraint",
    "exclude",
    "gres",
    "cpus_per_gpu",
    "gpus_per_task",
    "mem_per_gpu",
    "mem_per_cpu",
    "account",
    "signal_delay_s",
    "additional_parameters",
    "array_parallelism",
    "setup",
)
STATE_FILE = "cell.json"
"""In a cell's folder: its state (running, finished, failed, interrupted, not begun), hash, times
and error."""
STOP_FILE = ".stop"
"""In the ablation's folder: a byte for each Ctrl-C."""


def check_launcher(launcher: str, settings: list[str]) -> None:
    """Raises ConfigError for a launcher that does not exist, is not installed, or has no such
    setting."""
    if launcher not in LAUNCHERS:
        raise ConfigError(
            f"{COMMAND_LINE}: launcher={launcher}: no such launcher{hint(launcher, LAUNCHERS)}"
        )
    keys: list[str] = []
    if launcher == "submitit_slurm":
        keys = [*COMMON_SETTINGS, *SLURM_SETTINGS]
    # Only a cluster needs the package, which an extra installs.
    if keys and importlib.util.find_spec("submitit") is None:
        raise ConfigError(
            f"{COMMAND_LINE}: launcher={launcher}: not installed; pip install 'owlfuse[sweep]'"
        )
    for key, value in read_settings(settings).items():
        if key not in keys:
            raise ConfigError(
                f"{COMMAND_LINE}: launcher.{key}: no such setting of the launcher "
                f"{launcher}{hint(key, keys, 30)}"
            )
        if key in ("nodes", "tasks_per_node") and value != 1:
            raise ConfigError(
                f"{COMMAND_LINE}: launcher.{key}={value}: a cell is one task, which starts the "
                "processes of its devices itself; write trainer.devices=N launcher.gpus_per_node=N"
            )


def check_cluster(launcher: str) -> None:
    """Raises ConfigError for a launcher of SLURM on a machine that is not part of a cluster."""
    if launcher == "submitit_slurm" and shutil.which("srun") is None:
        raise ConfigError(
            f"{COMMAND_LINE}: launcher={launcher}: there is no srun on this machine; start the "
            "command on a node of the cluster"
        )


def read_settings(settings: list[str]) -> dict[str, Any]:
    """Return the values of `key=value` words by key. Raises ConfigError for what is not YAML."""
    values = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"{COMMAND_LINE}: launcher.{setting}: expected a value in YAML's notation"
            ) from None
    return values


def launch(
    folder: Path,
    keys: list[str],
    launcher: str,
    jobs: int,
    settings: list[str],
    deadline: float | None,
) -> None:
    """Runs the cells, and returns when all of them have ended, also after Ctrl-C.

    Args:
        settings: `key=value` words of the launcher, without the prefix `launcher.`.
        deadline: seconds since 1970 after which no cell is begun.
    """
    if not keys:
        return
    # Each process would take all cores by itself.
    threads = None
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    task = partial(run_cell, folder, deadline=deadline, threads=threads)
    if launcher == "basic":
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            slots.put(slot)

        def run_in_slot(key: str) -> str:
            slot = slots.get()
            try:
                return task(key, slot=slot if jobs > 1 else None)
            finally:
                slots.put(slot)

        # Threads are enough: a task only waits for the process of its cell.
        with ThreadPool(jobs) as pool:
            pool.map(run_in_slot, keys, chunksize=1)
        return
    values = {"array_parallelism": jobs, **read_settings(settings)}
    run_by_submitit(task, folder, keys, launcher.removeprefix("submitit_"), values)


def run_by_submitit(
    task: Callable[[str], str],
    folder: Path,
    keys: list[str],
    cluster: str,
    settings: dict[str, Any],
) -> None:
    """Submits a job for each cell and waits for all of them.

    A job that the cluster ends is a cell that failed. Raises ConfigError for a value that submitit
    does not take.
    """
    import submitit

    # Names of one cluster alone need its prefix.
    executor = submitit.AutoExecutor(folder / ".submitit", cluster=cluster)
    parameters = {"timeout_min": 60, "name": "owlfuse"}
    for key, value in settings.items():
        if key in COMMON_SETTINGS:
            parameters[key] = value
        else:
            parameters[f"slurm_{key}"] = value  # which the local executor leaves alone
    try:
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"{COMMAND_LINE}: launcher settings: {error}") from None
    submitted = executor.map_array(task, keys)  # on SLURM one array of jobs
    for key, job in zip(keys, submitted, strict=True):
        job_error = job.exception()
        # A time limit or the lack of memory ends a job without a word in cell.json.
        if job_error is not None and not interrupt_count(folder):
            run = folder / key
            # A job that never began has no folder.
            run.mkdir(exist_ok=True)
            reason = " ".join(str(job_error).split())[-300:]
            state = read_json_if_there(run / STATE_FILE)
            write_state(run, state, "failed", error=reason)


def run_cell(
    folder: Path,
    key: str,
    deadline: float | None,
    threads: int | None,
    slot: int | None = None,
) -> str:
    """Trains one cell in a process, and returns its state, which is in its cell.json too.

    Args:
        threads: of the process's OpenMP; None leaves the environment as it is.
        slot: which of the cells of a time it is, where there are several: each has GPUs of its own.
    """
    run = folder / key
    if interrupt_count(folder):
        return "not begun"
    # A worker of another machine knows the cell from the file alone.
    record = read_json(folder / "ablation.json")
    cell = next(cell for cell in record["cells"] if cell["key"] == key)
    checkpoints = checkpoints_of(run / "checkpoints")
    has_checkpoint = bool(checkpoints)
    facts: dict[str, Any] = {"hash": cell["hash"], "began": time.time()}
    facts["first_step"] = step_of(checkpoints[0]) if checkpoints else 0
    facts |= where_it_trains(run if has_checkpoint else None, record.get("jobs", 1))
    run.mkdir(parents=True, exist_ok=True)
    if deadline is not None and time.time() > deadline:
        reason = "the budget's minutes were used up"
        return write_state(run, facts, "not begun", error=reason)
    # A process that was left alone may still train the cell: the new one waits for it.
    if (run / "config.yaml").exists() and not has_checkpoint and not is_locked(run / ".lock"):
        archive_run(folder, key)  # it was stopped before its first checkpoint
        run.mkdir()
    # Bars and reports know by it that the cell is under way.
    write_state(run, facts, "running")

    log = run / "log.txt"
    # behind which this attempt writes
    earlier_bytes = log.stat().st_size if log.exists() else 0
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    if slot is not None:
        environment |= own_gpus(cell["config"]["trainer"].get("devices"), slot)
    code = train_in_process(folder, key, log, environment)
    last_line = clean_log(log, earlier_bytes)  # of a cell that failed, its error
    facts["ended"] = time.time()
    if code == 0:
        return write_state(run, facts, "finished")
    if code == 130 or interrupt_count(folder):  # 130 is Ctrl-C's exit code
        return write_state(run, facts, "interrupted")
    error = last_line.removeprefix("owlfuse: error: ")
    if code == -signal.SIGKILL:  # whatever it wrote last
        error = "ended by signal SIGKILL, as the system does where memory runs out"
    elif code < 0 and error == last_line:
        error = f"ended by signal {signal.Signals(-code).name}: {last_line}".rstrip(": ")
    elif not error:
        error = f"exit code {code}"
    return write_state(run, facts, "failed", error=error)


def where_it_trains(earlier_run: Path | None, jobs: int) -> dict[str, Any]:
    """Returns the machine of a cell, and how many cells it is measured beside; with those of the
    attempts that it goes on from.

    Args:
        earlier_run: its folder, where there is such an attempt.
    """
    machines = [machine()]
    if earlier_run is not None:
        earlier = read_json_if_there(earlier_run / STATE_FILE)
        jobs = max(jobs, earlier.get("jobs", 1))
        machines = list(dict.fromkeys([*str(earlier.get("machine", "")).split("; "), *machines]))
    return {"machine": "; ".join(filter(None, machines)), "jobs": jobs}


def own_gpus(devices: Any, slot: int) -> dict[str, str]:
    """Return the variable by which a cell sees as many GPUs as it has devices, and other ones than
    the cells beside it as far as there are enough; nothing where there is one GPU or none, or the
    cell takes all or certain ones."""
    import torch  # here: mistakes of a command are reported before

    gpu_count = torch.cuda.device_count()
    if gpu_count < 2 or not str(devices).isdecimal():
        return {}
    names = [str(index) for index in range(gpu_count)]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        names = [name.strip() for name in visible.split(",")][:gpu_count]
    first = slot * int(devices)
    own = [names[(first + index) % gpu_count] for index in range(min(int(devices), gpu_count))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def train_in_process(folder: Path, key: str, log: Path, variables: dict[str, str]) -> int:
    """Runs `owlfuse.studies.ablation.cell` to its end, in this environment with some variables, and
    returns its exit code."""
    module = "owlfuse.studies.ablation.cell"
    # With the id of this process, after whose end a cell does not go on.
    command = [sys.executable, "-m", module, str(folder), key, str(os.getpid())]
    environment = {**os.environ, **variables}
    if "SLURM_NTASKS" in environment:
        # Else Lightning would take the cell for all processes that SLURM has started, and start
        # none for its devices.
        environment["SLURM_JOB_NAME"] = "interactive"
    # A cell that goes on adds to the log of its first attempt.
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # A session of its own: the terminal's Ctrl-C reaches it through us, once.
            start_new_session=True,
            env=environment,
        )
    return wait_and_interrupt(process, folder)


def wait_and_interrupt(process: subprocess.Popen, folder: Path) -> int:
    """Waits for the process, hands each Ctrl-C on to it once, and returns its exit code."""
    sent = 0
    while (code := process.poll()) is None:
        try:
            time.sleep(0.1)
            # The third Ctrl-C ends the command itself (see `run.count_interrupts`).
            count = min(interrupt_count(folder), 2)
        # In a worker process, which the terminal's Ctrl-C reaches too: it is in STOP_FILE as well.
        except KeyboardInterrupt:
            continue
        while sent < count and process.poll() is None:
            process.send_signal(signal.SIGINT)
            sent += 1
            time.sleep(0.1)  # two signals at once may arrive as one
    return code


def interrupt_count(folder: Path) -> int:
    """Return how often Ctrl-C was pressed."""
    try:
        return len((folder / STOP_FILE).read_bytes())
    except OSError:
        return 0


def record_interrupt(folder: Path) -> None:
    """Adds a Ctrl-C to those that tasks read."""
    # Appended: two presses cannot overwrite each other.
    with (folder / STOP_FILE).open("ab") as file:
        file.write(b"x")


def clean_log(log: Path, earlier_bytes: int = 0) -> str:
    """Leaves of each line what a terminal would show at its end, and returns the last error, or
    else the last line, of what stands behind the log of earlier attempts."""
    content = log.read_bytes()
    earlier_lines = shown_lines(content[:earlier_bytes])
    lines = shown_lines(content[earlier_bytes:])
    log.write_text("\n".join([*earlier_lines, *lines, ""]), encoding="utf-8")
    errors = [line for line in lines if line.startswith("owlfuse: error: ")]
    # Of a crash there is no error of owlfuse, and the last line of the traceback says most.
    last_lines = errors or lines or [""]
    return last_lines[-1][:300]  # a line of a table


def shown_lines(content: bytes) -> list[str]:
    """Returns the lines of a log as a terminal would show them, without empty ones."""
    lines = []
    for line in content.decode(errors="replace").split("\n"):
        # A progress bar is written over itself: what follows the last carriage return is seen.
        visible = line.rstrip("\r").rpartition("\r")[2]
        visible = re.sub(r"\x1b?\[[0-9;]*[A-Za-z]", "", visible).rstrip()
        if visible:
            lines.append(visible)
    return lines


def is_locked(lock: Path) -> bool:
    """Return whether a process has the lock."""
    try:
        with lock.open("rb") as file:
            # Shared: two reports at a time do not see each other as a run.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def archive_run(folder: Path, key: str) -> None:
    """Moves a cell's folder into `old/`."""
    archive = folder / "old"
    archive.mkdir(exist_ok=True)
    # Microseconds: a cell may be put aside twice within a second.
    (folder / key).rename(archive / f"{key}.{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")


def write_state(run: Path, facts: dict[str, Any], state: str, **details: str) -> str:
    """Writes cell.json with some facts, the state and its details; returns the state."""
    write_json(run / STATE_FILE, {**facts, "state": state, **details})
    return state
