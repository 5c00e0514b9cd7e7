"""What happens beside the steps: checkpoints, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar


def make_callbacks(folder: Path, watched: str | None) -> list[Callback]:
    """Progress, learning rates, the last checkpoint, and the best by the metric `watched` where there is one."""
    callbacks: list[Callback] = [TQDMProgressBar(refresh_rate=5), LearningRateMonitor("step"), LastCheckpoint(folder)]
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

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Puts the handlers back that stood before."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())
