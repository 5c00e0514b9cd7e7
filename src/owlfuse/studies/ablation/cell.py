"""One cell of an ablation in a process of its own: `python -m owlfuse.studies.ablation.cell FOLDER
KEY`.

FOLDER/ablation.json holds the cell's overrides and hash. Memory that is measured is the cell's own,
and a crash is one cell's.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.artifacts.runs import has_no_locks
from owlfuse.config.build import to_dict
from owlfuse.config.compose import compose, take_keys
from owlfuse.config.identity import UNLEARNED_KEYS, code_hash, config_hash
from owlfuse.config.trust import accept
from owlfuse.core.errors import DataError, report_errors
from owlfuse.core.files import read_json

RESUMES = "OWLFUSE_CELL_RESUMES"
"""The environment variable with whether the cell goes on, `1` or `0`, for ranks that the first one
starts."""


def train_cell(folder: Path, key: str) -> None:
    """Trains the cell, or goes on with it where it has a checkpoint.

    Raises:
        DataError: code or configuration are not those that the ablation was begun with.
    """
    record = read_json(folder / "ablation.json")
    cell = next(cell for cell in record["cells"] if cell["key"] == key)
    run = folder / key
    with cell_locked(run):
        if is_started_by_first_rank():
            # which has written the run's config.yaml meanwhile
            resumes = os.environ[RESUMES] == "1"
        else:
            resumes = (run / "config.yaml").exists()
            os.environ[RESUMES] = str(int(resumes))
        config = compose_cell(folder, run, cell, resumes)
        # After the configuration: a mistake of it is reported before torch is imported.
        from owlfuse.training import train

        if config.get("init_from") and not resumes:
            from owlfuse.artifacts.init_from import adopt_parts

            adopt_parts(config)
        # Hashed as this process would run it: a file may have changed since the command began.
        plain = to_dict(config)
        check_hash("configuration", cell["hash"]["config"], config_hash(plain))
        check_hash("code", cell["hash"]["code"], code_hash(plain))
        train.run(config, cell["hash"].get("data"))


def is_started_by_first_rank() -> bool:
    """Return whether Lightning has started this process for a device of the cell."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def cell_locked(run: Path) -> Iterator[None]:
    """Locks the cell's folder inside the block, once a process that was left alone has ended; on
    the first rank alone."""
    if is_started_by_first_rank():
        yield
        return
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if not has_no_locks(run / ".lock", error):
                raise
        yield


def compose_cell(folder: Path, run: Path, cell: dict[str, Any], resumes: bool) -> DictConfig:
    """Return the cell's configuration, as its overrides or its checkpoint have it."""
    for word in cell["words"]:  # the user's, whose parts the run's config.yaml may name
        override, _, value = word.partition("=")
        if override.endswith("._target_"):
            accept({"_target_": value.strip("'\"")})
    # A run that goes on has its configuration in its folder, its overrides included.
    config = compose([f"resume={run}"] if resumes else cell["words"])
    with open_dict(config):
        # Its checkpoint has them as they were, and the command may have others now.
        take_keys(config, OmegaConf.create(cell["config"]), UNLEARNED_KEYS)
        config.accept_changed_data = cell["config"].get("accept_changed_data", False)
        config.runs, config.experiment, config.name = str(folder.parent), folder.name, cell["key"]
    return config


def check_hash(name: str, expected: str, actual: str) -> None:
    """Raises DataError where the hash is not that of the ablation's beginning."""
    if actual != expected:
        raise DataError(
            f"the {name} has changed since the ablation began ({expected} then, {actual} now)"
        )


def end_with_parent(parent: int) -> None:
    """Interrupts this process once the one that started it is gone: it ends after the step it is
    in, with a checkpoint."""
    # The parent of an orphan is another process: init, or a subreaper.
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> int:
    """Trains the cell of the command line; the exit codes are those of `owlfuse train`."""
    folder, key, parent = sys.argv[1:]
    # The ablation has started the first rank alone, which has started the others.
    watched = os.getppid() if is_started_by_first_rank() else int(parent)
    # A daemon: it must not keep a process alive whose training has ended.
    threading.Thread(target=end_with_parent, args=(watched,), daemon=True).start()
    return report_errors(lambda: train_cell(Path(folder), key), "train")


if __name__ == "__main__":
    sys.exit(main())
