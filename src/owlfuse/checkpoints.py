"""Checkpoints of a run: when they are written, and how, so that a kill leaves none half done. Their content: `weights`."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from owlfuse.runs import checkpoints_of, remove, sync, write_manifest
from owlfuse.types import DataError

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/step_<n>.ckpt` of a run, the newest ones, each written beside and renamed when it is whole.

    Between two steps the random states stand as the step left them: validation and saving use up none.

    Args:
        every: optimizer steps between two checkpoints; None: one at each validation. There is one at the end in any case.
        keep: how many of the newest are kept.
    """

    def __init__(self, every: int | None = None, keep: int = 2) -> None:
        if every is not None and every < 1:
            raise ValueError(f"checkpoint.every is {every}, expected at least 1 optimizer step, or null")
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}, expected at least 1")
        self.every = every
        self.keep = keep
        self.saved: int | None = None
        self.validated = False
        self.random: dict[str, Any] | None = None
        self.seconds = 0.0
        self.count = 0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Files are written in their place: Lightning would pass them through memory and the system's temporary folder."""
        with suppress(NotImplementedError):  # a strategy that writes a folder by itself
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = FileInPlace()

    def state_dict(self) -> dict[str, Any]:
        """The random states as of the step."""
        return {"random": self.random or random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`; they are set when the next batch begins, after all that is built until then."""
        self.random = state_dict["random"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A run that goes on need not write again what it was read from."""
        self.saved = trainer.global_step or None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves the step before, which is whole only now: logged, and validated where validation was due."""
        if self.random is not None:
            set_random_states(self.random)
        step = trainer.global_step
        due = self.validated if self.every is None else step % self.every == 0
        if due and step and batch_idx % trainer.accumulate_grad_batches == 0:
            self.save(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the random states as the step left them."""
        self.random = random_states()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation makes a checkpoint due."""
        self.validated = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves, and says what saving took."""
        self.save(trainer)
        if trainer.is_global_zero and self.count:
            print(f"{self.count} checkpoints written in {self.seconds:.1f} s")

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint of the trainer's step, unless it is there, and deletes those beyond `keep`. All ranks call it.

        Raises:
            DataError: it could not be written; the ones before are intact.
        """
        self.validated = False
        step = trainer.global_step
        if step == self.saved:
            return
        began = time.monotonic()
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{step:08}.ckpt"
        write(trainer, path, metrics=True)
        if trainer.is_global_zero:
            found = checkpoints_of(folder)
            # later ones were bad, or this run would have gone on from them
            kept = [other for other in found if other.name <= path.name][: self.keep]
            for other in set(found) - set(kept):
                remove(other)
        trainer.strategy.barrier()
        self.saved, self.count = step, self.count + 1
        self.seconds += time.monotonic() - began
        log.info("wrote %s in %.2f s", path, time.monotonic() - began)


class Best(Checkpoint):
    """Keeps `checkpoints/best.ckpt`, of the validation with the lowest value of the metric `watched`."""

    def __init__(self, watched: str) -> None:
        self.watched = watched
        self.lowest = float("inf")

    def state_dict(self) -> dict[str, Any]:
        """The lowest value so far."""
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.lowest = state_dict["lowest"]

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves where the metric fell. Raises DataError where it cannot be written."""
        value = float(trainer.callback_metrics.get(self.watched, float("inf")))
        if value < self.lowest:
            self.lowest = value
            write(trainer, Path(trainer.default_root_dir) / "checkpoints" / "best.ckpt")


class FileInPlace(TorchCheckpointIO):
    """Writes straight into the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `CheckpointIO`."""
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


def write(trainer: Trainer, path: Path, metrics: bool = False) -> None:
    """Saves beside `path` (`.part`), and renames when all is on the disk. A file or a folder, as the strategy writes it.

    Args:
        metrics: keep a manifest beside it, and metrics.csv as it is now, which a kill may leave half written.

    Raises:
        DataError: it could not be written; what was there is intact.
    """
    part = path.with_name(path.name + ".part")
    first = trainer.is_global_zero
    try:
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(part)
        trainer.strategy.barrier()
        trainer.save_checkpoint(part, weights_only=False)  # said, or Lightning says it at each
        trainer.strategy.barrier()
        if first:
            if metrics:
                copy_metrics(trainer, path)
            sync(part)
            if metrics:
                write_manifest(part, path)
            if path.is_dir():  # a folder is not renamed onto one that holds something
                path.rename(path.with_name(path.name + ".old.part"))
            part.rename(path)
            remove(path.with_name(path.name + ".old.part"))
            sync(path.parent)
    except (OSError, RuntimeError) as error:
        what = why_not_written(error)
        if what is None:
            raise
        if first:
            remove(part)
        raise DataError(
            f"{path} could not be written: {what}; the checkpoints before it are intact, so make room and go on with "
            f"resume={trainer.default_root_dir}"
        ) from error


def why_not_written(error: BaseException) -> str | None:
    """What the system said, which torch hides behind an error of its own; None: it is not about writing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return os.strerror(cause.errno) if cause.errno else str(cause)
        cause = cause.__cause__ or cause.__context__
    first_line = str(error).splitlines()[0] if str(error) else ""
    return first_line if any(word in first_line for word in ("Writer", "inline_container", "failed writing")) else None


def copy_metrics(trainer: Trainer, path: Path) -> None:
    """The rows logged so far, beside the checkpoint."""
    for logger in trainer.loggers:
        logger.save()
    source = Path(trainer.default_root_dir) / "metrics.csv"
    if source.exists():
        shutil.copyfile(source, path.with_suffix(".csv"))


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and its CUDA devices, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {**states, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Those of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
