"""Lightning's Trainer for a run, and what happens beside its steps: checkpoints, and Ctrl-C."""

from __future__ import annotations

import csv
import signal
import sys
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from owlfuse.build import build
from owlfuse.data.datamodule import ChatData
from owlfuse.first_steps import FirstStepsCheck


def make_trainer(config: DictConfig, data: ChatData, folder: Path) -> Trainer:
    """The Trainer, its accumulation made of batch sizes and ranks, its validation interval in optimizer steps."""
    before = read_metrics(folder)
    loggers = [build(logger, save_dir=folder, name="", version="") for logger in (config.logger or {}).values()]
    for logger in loggers:
        if isinstance(logger, CSVLogger) and before:  # Lightning would begin the file anew
            logger.experiment.metrics = before
            logger.save()
    watched = f"{next(iter(data.validation))}/loss" if data.validation else None
    trainer = build(
        config.trainer,
        logger=loggers,
        callbacks=make_callbacks(folder, watched),
        default_root_dir=str(folder),
        check_val_every_n_epoch=None,
        max_epochs=-1,  # the whole run is one epoch of max_steps
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    asked, steps = trainer.max_steps, data.steps(trainer.max_steps)
    if steps < asked and trainer.is_global_zero:
        print(f"the data end (at_end) after {steps} whole steps of {asked}, so the run does")
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.val_check_interval = min(config.trainer.val_check_interval, trainer.max_steps) * trainer.accumulate_grad_batches
    return trainer


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, none where there is no such file."""
    try:
        with (folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def raise_if_stopped(trainer: Trainer, folder: Path) -> None:
    """Raises KeyboardInterrupt after a fit that Ctrl-C ended, and says how to go on."""
    if any(isinstance(callback, LastCheckpoint) and callback.stopped for callback in trainer.callbacks):
        if trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}; go on with: owlfuse train resume={folder}")
        raise KeyboardInterrupt


def make_callbacks(folder: Path, watched: str | None) -> list[Callback]:
    """Progress, learning rates, the look at the first steps, the last checkpoint, and the best by the metric `watched` where
    there is one."""
    callbacks: list[Callback] = [TQDMProgressBar(refresh_rate=5), LearningRateMonitor("step"), FirstStepsCheck()]
    callbacks.append(LastCheckpoint(folder))
    if watched:
        best = ModelCheckpoint(folder / "checkpoints", "best", monitor=watched, mode="min", enable_version_counter=False)
        callbacks.append(best)
    return callbacks


class LastCheckpoint(Callback):
    """Keeps `checkpoints/last.ckpt`: at every look at the validation sources, at the end, and after Ctrl-C.

    The first Ctrl-C (or SIGTERM) ends the run after the step it is in, the second at once.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints" / "last.ckpt"
        self.stopped = False
        self.handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Listens to Ctrl-C in the place of Python's own handler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.stop_after_step)

    def stop_after_step(self, number: int, frame: Any) -> None:
        """The signals' handler."""
        if self.stopped:
            self.restore_handlers()
            raise KeyboardInterrupt
        self.stopped = True
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the run between two optimizer steps, never inside one."""
        if self.stopped and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves, if training is under way."""
        if not trainer.sanity_checking and trainer.global_step:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves."""
        trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Ends the progress bar's line, so that the error has its own."""
        print(file=sys.stderr)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Puts the handlers back that stood before."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())
