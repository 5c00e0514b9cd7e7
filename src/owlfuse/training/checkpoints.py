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
from weakref import proxy

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.nn.modules.batchnorm import _BatchNorm

from owlfuse.artifacts.runs import BEST, STEP_DIGITS, checkpoints_of
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.parallel.checkpoints import (
    BACKGROUND,
    CheckpointWriter,
    gather_from_ranks,
    raised_on_every_rank,
)
from owlfuse.parallel.collectives import data_rank, data_ranks
from owlfuse.training.callbacks import callbacks_of, is_stopped

log = logging.getLogger(__name__)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which writes into the run's `checkpoints/`.

    Args:
        background: training goes on while a checkpoint is written.
        options: of ModelCheckpoint.
    """

    def __init__(self, background: bool = False, **options: Any) -> None:
        super().__init__(
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a damaged checkpoint of the same step is replaced
            save_on_train_epoch_end=False,
            **options,
        )
        self.background = background
        self.storage_options = BACKGROUND if background else None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """The folder is the run's, whichever logger comes first."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, module, stage)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # Private in Lightning. All triggers of ModelCheckpoint end here, and its own method has no
        # `storage_options`, without which every caller's checkpoints would go to the background.
        trainer.save_checkpoint(filepath, weights_only=False, storage_options=self.storage_options)
        self._last_global_step_saved = trainer.global_step
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


class Checkpoints(RunCheckpoint):
    """Keeps `checkpoints/step_<n>.ckpt` of a run, the newest ones.

    Between two steps the random states stand as the step left them: validation and saving use up
    none. Those of every rank are kept, and given back to it where as many ranks share the rows as
    before.

    ModelCheckpoint says which steps are saved, and this class when: at the start of the next batch
    and not at the end of the last, where the step's row of metrics.csv is missing and its
    validation is still to come, so that a run that goes on would have neither. It also says which
    are deleted: ModelCheckpoint never deletes the one that a run went on from, of each of many
    kills one, and forgets all when the folder is moved.

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
        super().__init__(
            background,
            filename=f"step_{{step:0{STEP_DIGITS}d}}",  # so that names sort by step
            every_n_train_steps=every,
            save_top_k=-1,  # none is deleted but by `_save_checkpoint`
        )
        self.keep = keep
        self.writer: CheckpointWriter | None = None
        self.seconds = 0.0
        """For which training waited."""
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
        super().setup(trainer, module, stage)
        with suppress(NotImplementedError):  # of such a strategy
            # exactly that class: a plugin of the user's own choice stays
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = CheckpointWriter()
            if isinstance(trainer.strategy.checkpoint_io, CheckpointWriter):
                self.writer = trainer.strategy.checkpoint_io
        if self.storage_options and self.writer is None:
            raise ConfigError(
                f"checkpoint.background: {type(trainer.strategy).__name__} writes checkpoints by "
                "itself; expected false"
            )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: which checkpoints there are is read from the folder."""
        return {}

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The random states of every rank as of the step, and metrics.csv as it is now."""
        states = self.random or random_states()
        checkpoint["random_states"] = gather_from_ranks(trainer.strategy, states)
        checkpoint["data_ranks"] = data_ranks(trainer)
        checkpoint["ended"] = bool(trainer.should_stop) and not is_stopped(trainer)
        # Rank 0 alone reads the file, and the others must not go on where it cannot.
        with raised_on_every_rank(trainer.strategy):
            checkpoint["metrics"] = logged_metrics(trainer) if trainer.is_global_zero else None

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See `on_save_checkpoint`; they are set when the next batch begins, after all that is
        built until then.

        Lightning calls this before any callback takes its own state.
        """
        begins_anew = any(best.begins_anew for best in callbacks_of(trainer, Best))
        for stopping in callbacks_of(trainer, EarlyStopping):
            if begins_anew:  # its best value is of other samples
                checkpoint["callbacks"].pop(stopping.state_key, None)
            # EarlyStopping would take its former patience with its state.
            elif state := checkpoint["callbacks"].get(stopping.state_key):
                state["patience"] = stopping.patience
        steps = gather_from_ranks(trainer.strategy, checkpoint["global_step"])
        if len(set(steps)) > 1:  # of a shared disk that does not show all of them the same files
            raise DataError(
                f"resume: the ranks have found checkpoints of the steps {steps}, expected one step;"
                " go on when all machines see the same files"
            )
        states, ranks = checkpoint.get("random_states"), data_ranks(trainer)
        if states is None:  # of runs that kept those of the first rank only
            states = [checkpoint["callbacks"]["Checkpoints"]["random"]]
        # With as many processes the rows may be shared out otherwise, by tensor ranks.
        if len(states) == trainer.world_size and checkpoint.get("data_ranks", 1) == ranks:
            self.random = states[trainer.global_rank]
            return
        self.random = derived_states(trainer, checkpoint["global_step"])
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
        super().on_train_start(trainer, module)
        self._last_global_step_saved = trainer.global_step
        self.random_of_step = self.random
        if self.random is None and data_rank(trainer):
            self.random = derived_states(trainer, trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step before, which is whole only now: logged, and validated where validation
        was due."""
        if self.random is not None:
            set_random_states(self.random)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        # needed after an error within the step, where a run of one process writes a checkpoint
        if trainer.world_size == 1:
            buffers = [buffer.clone() for buffer in statistics_of(module)]
            self.statistics = trainer.global_step, buffers
        super().on_train_batch_end(trainer, module, None, batch, batch_idx)
        if self.validated:
            super().on_validation_end(trainer, module)
        self.validated = False

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the random states as the micro batch left them."""
        self.random = random_states()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.random_of_step = self.random

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Has the next batch's start call ModelCheckpoint's hook."""
        self.validated = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves, waits until all is written, and says what saving took.

        Raises DataError as `_save_checkpoint` does.
        """
        self.save(trainer)
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
        # A checkpoint of such weights would take the place of a good one.
        if module.finite.told:
            return
        # Lightning has put the average in the weights' place until the validation ends.
        if callbacks_of(trainer, WeightAveraging) and trainer.validating:
            log.error(
                "the validation after step %d was broken off with the average in the weights' "
                "place; the last checkpoint before it is what is left",
                step,
            )
            return
        if module.updating:
            log.error(
                "the update after step %d was broken off; the last checkpoint before it is what is "
                "left",
                step,
            )
            return
        # The broken step is done again as a whole, from the random numbers that it began with.
        self.random = self.random_of_step
        if self.statistics[0] == step:
            for buffer, before in zip(statistics_of(module), self.statistics[1]):
                buffer.copy_(before)
        try:
            self.save(trainer)
            self.finish(trainer)
        except DataError as error:
            log.error("%s", error)

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint of the trainer's step, unless it is there. All ranks call it."""
        if trainer.global_step != self._last_global_step_saved:
            step = torch.tensor(trainer.global_step)
            self._save_checkpoint(trainer, self.format_checkpoint_name({"step": step}))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes a checkpoint, and deletes those beyond `keep`.

        Raises:
            DataError: it, or the one before, could not be written, or a loss was no finite number;
                the ones before are intact.
        """
        module: Any = trainer.lightning_module
        module.finite.check(Path(trainer.default_root_dir))
        self.can_write = False  # until it is written: after an error of writing none is tried again
        began = time.monotonic()
        super()._save_checkpoint(trainer, filepath)
        self.seconds += time.monotonic() - began
        log.info("saving %s took %.2f s of training's time", filepath, time.monotonic() - began)
        self.can_write = True
        self.count += 1
        # After the new one, so that there is always one to go on from.
        if trainer.is_global_zero:
            for outdated in outdated_checkpoints(self.keep, Path(filepath)):
                trainer.strategy.remove_checkpoint(outdated)

    def finish(self, trainer: Trainer) -> None:
        """Waits until all is written. All ranks call it; raises on every rank what failed on
        any."""
        began = time.monotonic()
        if self.writer is not None:
            with raised_on_every_rank(trainer.strategy):
                self.writer.wait()
        self.seconds += time.monotonic() - began


class LastCheckpoint(Callback):
    """Has the checkpoint of the last step written before other callbacks end: one of weight
    averaging copies the average over the weights then, and a run that goes on would train that.
    Lightning moves `Checkpoints` behind all others; this one stands before the user's."""

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """See `Checkpoints.save`."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer)


def logged_metrics(trainer: Trainer) -> str | None:
    """Returns what metrics.csv holds now, which a kill may leave half written later; None where
    nothing writes it."""
    for logger in trainer.loggers:
        # CSVLogger writes its rows every so many steps only, or when it is saved.
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


class Best(RunCheckpoint):
    """Keeps `checkpoints/best.ckpt`, of the validation with the lowest value of the metric
    `watched`."""

    def __init__(self, watched: str, background: bool = False) -> None:
        super().__init__(background, filename=Path(BEST).stem, monitor=watched)
        self.begins_anew = False
        """Whether the values until now are of other samples, so that none is compared with them."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Does nothing where the value was not measured, for which Lightning raises an error."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, module)

    @property
    def state_key(self) -> str:
        """The same whatever is watched, as Lightning's is not."""
        return "Best"

    def state_dict(self) -> dict[str, Any]:
        """The lowest value so far, without Lightning's paths: a run's folder may be moved."""
        return {} if self.best_model_score is None else {"lowest": float(self.best_model_score)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        if self.begins_anew:
            return
        self.best_model_path = self.kth_best_model_path = self.format_checkpoint_name({})
        # what ModelCheckpoint compares the next validation with
        self.best_model_score = self.kth_value = torch.tensor(state_dict["lowest"])
        self.best_k_models = {self.best_model_path: self.kth_value}


def derived_states(trainer: Trainer, step: int) -> dict[str, Any]:
    """Random states made of the seed, the data rank and a step; the present ones stay."""
    present = random_states()
    # SeedSequence mixes them: a sum would be the same for other ranks and steps.
    sequence = np.random.SeedSequence([torch.initial_seed(), data_rank(trainer), step])
    numbers = [int(number) for number in sequence.generate_state(3)]
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
    kind, keys, *position = legacy
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *position),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Those of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *position = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
