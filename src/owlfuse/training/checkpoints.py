"""Checkpoints of a run: when they are written, and with which random states.

How: `owlfuse.parallel.checkpoints`; the model in them: `owlfuse.artifacts.weights`.
"""

from __future__ import annotations

import logging
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch.nn.modules.batchnorm import _BatchNorm

from owlfuse.artifacts.runs import BEST, checkpoints_of
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.parallel.checkpoints import (
    BACKGROUND,
    CheckpointWriter,
    every_rank,
    raised_on_every_rank,
)
from owlfuse.parallel.collectives import data_rank, data_ranks

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/step_<n>.ckpt` of a run, the newest ones, each written beside and renamed
    when it is whole.

    Between two steps the random states stand as the step left them: validation and saving use up
    none. Those of every rank are kept, and given back to it where as many ranks share the rows as
    before.

    Args:
        every: optimizer steps between two checkpoints; None: one at each validation. There is one
            at the end in any case.
        keep: how many of the newest are kept.
        background: training goes on while a checkpoint is written. It takes memory on the CPU for a
            copy of what is trained and of the optimizer's state, which no plan counts, and an error
            is told at the next checkpoint only; so it is asked for.
    """

    def __init__(self, every: int | None = None, keep: int = 2, background: bool = False) -> None:
        if every is not None and every < 1:
            raise ValueError(
                f"checkpoint.every is {every}, expected at least 1 optimizer step, or null"
            )
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}, expected at least 1")
        self.every = every
        self.keep = keep
        self.storage_options = BACKGROUND if background else None
        self.writer: CheckpointWriter | None = None
        self.seconds = 0.0
        """For which training waited."""
        self.saved: int | None = None
        self.validated = False
        self.random: dict[str, Any] | None = None
        self.random_of_step: dict[str, Any] | None = None
        """As the last whole step left them; `random` is of the last micro batch."""
        self.statistics: tuple[int, list[torch.Tensor]] = (0, [])
        """A step, and the statistics of batch norms as it found them, which a forward pass
        changes before its step is whole."""
        self.count = 0
        self.can_write = True

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Puts our `CheckpointWriter` in the place of Lightning's.

        Raises ConfigError where a strategy writes by itself, and at once.
        """
        with suppress(NotImplementedError):  # of such a strategy
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = CheckpointWriter()
            if isinstance(trainer.strategy.checkpoint_io, CheckpointWriter):
                self.writer = trainer.strategy.checkpoint_io
        if self.storage_options and self.writer is None:
            raise ConfigError(
                f"checkpoint.background: {type(trainer.strategy).__name__} writes checkpoints by "
                "itself; expected false"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The random states of every rank as of the step, and metrics.csv as it is now."""
        checkpoint["random_states"] = every_rank(trainer.strategy, self.random or random_states())
        checkpoint["data_ranks"] = data_ranks(trainer)
        with raised_on_every_rank(trainer.strategy):
            checkpoint["metrics"] = logged_metrics(trainer) if trainer.is_global_zero else None

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See `on_save_checkpoint`; they are set when the next batch begins, after all that is
        built until then."""
        steps = every_rank(trainer.strategy, checkpoint["global_step"])
        if len(set(steps)) > 1:  # of a shared disk that does not show all of them the same files
            raise DataError(
                f"resume: the ranks have found checkpoints of the steps {steps}, expected one step;"
                " go on when all machines see the same files"
            )
        states, ranks = checkpoint.get("random_states"), data_ranks(trainer)
        if states is None:  # of runs that kept those of the first rank only
            states = [checkpoint["callbacks"][self.state_key]["random"]]
        if len(states) == trainer.world_size and checkpoint.get("data_ranks", 1) == ranks:
            self.random = states[trainer.global_rank]
            return
        self.random = derived_states(
            torch.initial_seed(), data_rank(trainer), checkpoint["global_step"]
        )
        if trainer.is_global_zero:
            log.warning(
                "the checkpoint is of %d ranks, %s of them with rows of their own, and %d (%d) go "
                "on: their random states are "
                "made anew from seed, rank and step, and dropout differs from that of a run never "
                "stopped",
                *(len(states), checkpoint.get("data_ranks", "?"), trainer.world_size, ranks),
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A run that goes on need not write again what it was read from.

        Ranks that begin with other rows drop out others.
        """
        self.saved = trainer.global_step or None
        self.random_of_step = self.random
        if self.random is None and data_rank(trainer):
            self.random = derived_states(
                torch.initial_seed(), data_rank(trainer), trainer.global_step
            )

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step before, which is whole only now: logged, and validated where validation
        was due."""
        if self.random is not None:
            set_random_states(self.random)
        step = trainer.global_step
        if trainer.world_size == 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            self.statistics = step, [buffer.clone() for buffer in statistics_of(module)]
        due = self.validated if self.every is None else step % self.every == 0
        if due and step and batch_idx % trainer.accumulate_grad_batches == 0:
            self.save(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the random states as the micro batch left them."""
        self.random = random_states()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.random_of_step = self.random

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation makes a checkpoint due."""
        self.validated = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves, waits until all is written, and says what saving took.

        Raises DataError as `save` does.
        """
        self.save(trainer, module)
        self.finish(trainer)
        if trainer.is_global_zero and self.count:
            how = " in the background; training waited for" if self.storage_options else " in"
            plural = "s" * (self.count > 1)
            print(f"{self.count} checkpoint{plural} written{how} {self.seconds:.1f} s")

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        """The last whole step gets a checkpoint; the pending one is finished when Lightning tears
        the strategy down.

        Not of several processes, of which the others may wait elsewhere: they go on from the
        checkpoint before. Not after a second Ctrl-C, which asks for the end at once.
        """
        step = trainer.global_step
        if (
            trainer.world_size > 1
            or not self.can_write
            or not step
            or isinstance(exception, KeyboardInterrupt)
        ):
            return
        if module.finite.told:
            return
        if module.updating:
            log.error(
                (
                    "the update after step %d was broken off; the last checkpoint before it is "
                    "what "
                    "is left"
                ),
                step,
            )
            return
        self.random = self.random_of_step
        if self.statistics[0] == step:
            for buffer, before in zip(statistics_of(module), self.statistics[1]):
                buffer.copy_(before)
        try:
            self.save(trainer, module)
            self.finish(trainer)
        except DataError as error:
            log.error("%s", error)

    def save(self, trainer: Trainer, module: Any) -> None:
        """Writes the checkpoint of the trainer's step, unless it is there, and deletes those beyond
        `keep`. All ranks call it.

        Raises:
            DataError: it, or the one before, could not be written, or a loss was no finite number;
                the ones before are intact.
        """
        self.validated = False
        step = trainer.global_step
        if step == self.saved:
            return
        module.finite.check(Path(trainer.default_root_dir))
        path = Path(trainer.default_root_dir) / "checkpoints" / f"step_{step:08}.ckpt"
        self.can_write = False  # until it is written: after an error of writing none is tried again
        began = time.monotonic()
        trainer.save_checkpoint(path, weights_only=False, storage_options=self.storage_options)
        self.seconds += time.monotonic() - began
        log.info("saving %s took %.2f s of training's time", path, time.monotonic() - began)
        self.can_write = True
        self.saved, self.count = step, self.count + 1
        if trainer.is_global_zero:
            for outdated in outdated_checkpoints(self.keep, path):
                trainer.strategy.remove_checkpoint(outdated)

    def finish(self, trainer: Trainer) -> None:
        """Waits until all is written. All ranks call it; raises on every rank what failed on
        any."""
        began = time.monotonic()
        if self.writer is not None:
            with raised_on_every_rank(trainer.strategy):
                self.writer.wait()
        self.seconds += time.monotonic() - began


def logged_metrics(trainer: Trainer) -> str | None:
    """Returns what metrics.csv holds now, which a kill may leave half written later; None where
    nothing writes it."""
    for logger in trainer.loggers:
        logger.save()
    file = Path(trainer.default_root_dir) / "metrics.csv"
    return file.read_text(encoding="utf-8") if file.exists() else None


def statistics_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """The buffers of the batch norms that learn by forward passes."""
    norms = (norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training)
    return [buffer for norm in norms for buffer in norm.buffers()]


def outdated_checkpoints(keep: int, newest: Path) -> list[Path]:
    """Returns all checkpoints but `newest` and the `keep - 1` before it.

    Later ones are damaged, or this run would have gone on from them.
    """
    present = [path for path in checkpoints_of(newest.parent) if path != newest]
    earlier = [path for path in present if path.name < newest.name]
    retained = earlier[: keep - 1]
    return [path for path in present if path not in retained]


class Best(Checkpoint):
    """Keeps `checkpoints/best.ckpt`, of the validation with the lowest value of the metric
    `watched`."""

    def __init__(self, watched: str, storage_options: dict[str, bool] | None = None) -> None:
        self.watched = watched
        self.storage_options = storage_options
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
            path = Path(trainer.default_root_dir) / "checkpoints" / BEST
            trainer.save_checkpoint(path, weights_only=False, storage_options=self.storage_options)


def derived_states(seed: int, rank: int, step: int) -> dict[str, Any]:
    """Random states made of three numbers; the present ones stay."""
    present = random_states()
    numbers = [
        int(number) for number in np.random.SeedSequence([seed, rank, step]).generate_state(3)
    ]
    random.seed(numbers[0])
    np.random.seed(numbers[1])
    torch.manual_seed(numbers[2])
    states = random_states()
    set_random_states(present)
    return states


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and this rank's CUDA device, in types that
    `torch.load(weights_only=True)` reads."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    states: dict[str, Any] = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {**states, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Those of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
