"""A run's folder:

`runs/<experiment>/<name>/` with config.yaml, checkpoints/, metrics.csv, mixture.json, results.json.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from owlfuse.config.messages import split_settings
from owlfuse.core.checkpoint_files import find_checkpoint_error, find_damage, remove_checkpoint
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.files import atomic_write, read_json, write_json
from owlfuse.core.folder_kinds import check_exported, describe_path

log = logging.getLogger(__name__)

NAME = "OWLFUSE_RUN_NAME"
"""The environment variable with the run's name, for ranks that the first one starts."""
BEST = "best.ckpt"
WHICH = ("last", "best")
"""The values of `which=`, a run's checkpoint."""
TOKENIZER_FOLDER = "tokenizer"
"""Of a run, with its tokenizer and chat template."""
STEP_DIGITS = 8
"""Of the step in a checkpoint's name."""
LOCK = ".in_use"
"""The file in a run's folder that its process locks, with the process in it."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks, as some of clusters are."""
BEGUN: tuple[str, ...] = (
    "metrics.csv",
    "hparams.yaml",
    "events.out.tfevents.*",
    "progress.json",
    "mixture.json",
    "before.json",
    "answers_before.jsonl",
    "logger_ids.json",
    "hpc_ckpt_*.ckpt",
    # last: without it the folder is no run's
    "config.yaml",
)
"""What a run writes before its first checkpoint, beside its tokenizer."""


def run_folder(config: DictConfig) -> Path:
    """Returns the run's folder. One that is named by the time is made here, so that no other run
    has the same.

    Raises:
        DataError: the folder for runs cannot be written into.
    """
    if config.resume:
        return Path(config.resume)
    runs = Path(config.runs).expanduser() / config.experiment
    if config.name:
        return runs / config.name
    if is_first_rank():
        os.environ[NAME] = make_timed_folder(runs).name
    # ranks that the first one starts inherit its name
    return runs / os.environ.get(NAME, "unnamed")


def is_first_rank() -> bool:
    """Returns whether this process is the one that writes files."""
    # lightning takes seconds, and mistakes of a command are reported before
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def make_timed_folder(runs: Path) -> Path:
    """Makes a folder named by the time, and by a number where another run began in the same second.

    Raises DataError.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, number = runs / now, 1
    while True:
        try:
            runs.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        # another run began in this second, or a file is where the folder of runs would be
        except FileExistsError:
            if not runs.is_dir():
                raise DataError(f"runs: {runs} is no folder") from None
            number += 1
            folder = runs / f"{now}_{number}"
        except OSError as error:
            raise DataError(f"runs: {folder} cannot be made: {error.strerror}") from error


@contextmanager
def in_use(folder: Path, resume: bool) -> Iterator[None]:
    """Locks the run's folder against every other process inside the block; on the first rank alone.
    The system unlocks it if the process dies.

    Raises:
        ConfigError: another process holds it, or a new run would write over one that is there.
        DataError: it cannot be written into.
    """
    if not is_first_rank():
        yield
        return
    advice = "stop it" if resume else "choose another name="
    with locked(folder, "runs", advice):
        if not resume:
            check_free(folder)
        yield


@contextmanager
def locked(folder: Path, key: str, advice: str) -> Iterator[None]:
    """Makes a folder and locks it against every other process inside the block. The system unlocks
    it if the process dies.

    Args:
        key: of the configuration that names the folder, for messages.
        advice: what to do where another process holds it, beside waiting.

    Raises:
        ConfigError: another process holds it.
        DataError: it cannot be written into.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_locked(path)
    except BlockingIOError:
        raise ConfigError(
            f"{folder} is in use by {holder(path)}; wait until it ends, or {advice}"
        ) from None
    except OSError as error:
        raise DataError(f"{key}: {folder} cannot be written into: {error.strerror}") from error
    with lock:
        # the file of a process that was killed still names that one
        lock.truncate(0)
        facts = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        lock.write(json.dumps(facts) + "\n")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # a run that was refused leaves no empty folder


def open_locked(path: Path) -> TextIO:
    """Returns the file, opened and, where the file system has locks, locked. Raises BlockingIOError
    where another process has locked it."""
    while True:
        lock = path.open("a+", encoding="utf-8")
        try:
            # lockf, not flock, whose lock forked data workers would hold after the run is killed
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if has_no_locks(path, error):
                return lock
            lock.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(*error.args) from error
            raise
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            return lock
        lock.close()  # its process ended in between and deleted the file


def has_no_locks(path: Path, error: OSError) -> bool:
    """Returns whether a file could not be locked because its file system has no locks, and logs
    it."""
    if error.errno not in NO_LOCKS:
        return False
    text = "%s cannot be locked: %s; let no other process use this folder meanwhile"
    log.warning(text, path, error.strerror)
    return True


def holder(path: Path) -> str:
    """Returns the process that holds a lock, in words."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it is about to write the file or to end


def check_not_there(folder: Path) -> None:
    """Raises ConfigError for the folder of a run that a new one would write over."""
    if not (folder / "config.yaml").exists():
        return
    if checkpoints_of(folder / "checkpoints") or (folder / "results.json").exists():
        raise ConfigError(
            f"name: the run {folder} exists; choose another name=, or go on with it by "
            f"resume={folder}"
        )
    if (folder / "checkpoints" / BEST).exists():
        raise ConfigError(
            f"name: the run {folder} has {BEST}, which which=best reads, and nothing to go on "
            "from; choose another name=, or delete the folder"
        )


def check_free(folder: Path) -> None:
    """Clears the folder of a run that ended before its first checkpoint.

    Raises ConfigError for a run with more in it.
    """
    check_not_there(folder)
    if not (folder / "config.yaml").exists():
        return
    print(f"{folder} was begun and has no checkpoint yet, so it begins anew")
    remove_checkpoint(folder / "checkpoints")
    # another configuration may have another one
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    for pattern in BEGUN:
        for path in folder.glob(pattern):
            path.unlink()


def write_config(config: DictConfig, folder: Path, changes: Sequence[dict[str, Any]]) -> None:
    """Makes the folder and writes the resolved configuration, from which the run can be repeated;
    on the first rank alone.

    Args:
        changes: earlier values of changed keys, and their steps (see `resume`), written as
            comments.
    """
    if not is_first_rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    saved: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    # resume belongs to the command; the file is to begin the same run anew
    saved.resume = None
    saved.name = folder.name
    if saved.get("accept_changed_data"):
        # the user has accepted this change of the data, not the next one
        saved.accept_changed_data = False
    with atomic_write(folder / "config.yaml") as file:
        for change in changes:
            for key, (before, after) in change["changes"].items():
                file.write(f"# until step {change['step']}: {key} was {before}, then {after}\n")
        file.write(OmegaConf.to_yaml(saved))


def write_mixture(folder: Path, report: dict[str, Any]) -> None:
    """Writes mixture.json: the samples that were drawn, skipped and cut."""
    write_json(folder / "mixture.json", report)


def last_checkpoint(folder: Path) -> Path:
    """The newest good checkpoint of a run, a file or a folder; what is wrong with newer ones is
    said in a warning.

    Raises:
        ConfigError: there is none.
    """
    checkpoints = checkpoints_of(folder / "checkpoints")
    bad: list[str] = []
    for path in checkpoints:
        wrong = find_checkpoint_error(path) or find_damage(path)
        if wrong is None:
            for line in bad:
                log.warning("%s; going on from %s, the one before", line, path.name)
            best = path.parent / BEST
            if best.exists() and (wrong := find_checkpoint_error(best)):
                log.warning(
                    "checkpoint %s %s; the next validation that is better writes it anew",
                    best,
                    wrong,
                )
            return path
        bad.append(f"checkpoint {path} {wrong}")
    if not bad and (folder / "checkpoints" / BEST).exists():
        raise ConfigError(
            f"resume: {folder} has {BEST} alone, which `owlfuse eval`, `chat` and `export` read by "
            "which=best, and no checkpoint to go on from"
        )
    if not bad:
        raise ConfigError(
            f"resume: {folder} has no checkpoint in checkpoints/; begin it again by the command "
            "that began it"
        )
    raise ConfigError(f"resume: {'; '.join(bad)}; start it anew with another name=")


def chosen_checkpoint(folder: Path, which: str) -> Path:
    """The newest good checkpoint (`last`), or that of the lowest validation loss (`best`).

    Raises ConfigError.
    """
    check_which(which)
    if which == "last":
        return last_checkpoint(folder)
    best = folder / "checkpoints" / BEST
    if not best.exists():
        raise ConfigError(
            f"which=best: {folder} has no {BEST}, as a run without a validation has none; take "
            "which=last"
        )
    if wrong := find_checkpoint_error(best) or find_damage(best):
        raise ConfigError(f"which=best: checkpoint {best} {wrong}; take which=last")
    return best


def checkpoint_of(model_dir: Path, which: str) -> Path | None:
    """Returns the chosen checkpoint of a run's folder; None of an exported one. Raises
    ConfigError."""
    if not (model_dir / "config.yaml").is_file():
        check_which(which, of_run=False)
        return None
    return chosen_checkpoint(model_dir, which)


def split_which(words: list[str]) -> tuple[str, list[str]]:
    """The value of `which=` among a command's words, `last` where there is none, and the other
    words. Raises ConfigError."""
    settings, others = split_settings(words, ["which"])
    which = settings.get("which", "last")
    check_which(which)
    return which, others


def check_which(which: str, of_run: bool = True) -> None:
    """Raises ConfigError for another word than those that name a checkpoint, and for a choice
    where there is none."""
    if which not in WHICH:
        raise ConfigError(f"command line: which={which}: expected {' or '.join(WHICH)}")
    if which != "last" and not of_run:
        raise ConfigError(
            f"command line: which={which}: an exported folder has no checkpoints; name a run's "
            "folder"
        )


def check_model(folder: str | Path, which: str = "last") -> Path:
    """The folder of a model: of a run, or one that was exported or imported. Nothing of it is read
    but what it is.

    Raises:
        DataError: it is neither.
        ConfigError: `which` is no checkpoint's name, or names one of a folder that has none.
    """
    model_dir = Path(folder).expanduser()
    is_run = (model_dir / "config.yaml").is_file()
    if not is_run and not (model_dir / "config.json").is_file():
        if kind := describe_path(model_dir):
            raise DataError(f"{model_dir} {kind}")
        problem = "it is not a folder"
        if model_dir.is_dir():
            problem = "it has neither a run's config.yaml nor an export's config.json"
        raise DataError(
            f"{model_dir}: no model: {problem}; name a run, or what `owlfuse export` or `owlfuse "
            "import` wrote"
        )
    if not is_run:
        check_exported(model_dir)
    check_which(which, is_run)
    return model_dir


def checkpoints_of(folder: Path) -> list[Path]:
    """Those in `checkpoints/`, the newest first; last of all `last.ckpt`, as runs once had. A
    user's copy by another name is none of them."""
    last = folder / "last.ckpt"
    by_step = folder.glob(f"step_{'[0-9]' * STEP_DIGITS}.ckpt")
    return [*sorted(by_step, reverse=True), *([last] if last.exists() else [])]


def step_of(path: Path) -> int:
    """The optimizer steps that a checkpoint was written after."""
    if path.name == "last.ckpt":
        import torch

        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    return int(path.stem.removeprefix("step_"))


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's `results.json`, nothing where there is none yet."""
    path = folder / "results.json"
    return read_json(path) if path.exists() else {}


def metrics_of(folder: Path | None) -> dict[str, float]:
    """The numbers of a run's results.json; none where there is no such file yet."""
    return {} if folder is None else numbers_of(read_results(folder))


def numbers_of(results: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of the content of a results.json that are numbers."""
    metrics = results.get("metrics") or {}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
