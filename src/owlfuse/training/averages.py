"""What Lightning's WeightAveraging, of which EMA is one kind, leaves to its users."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from owlfuse.training.callbacks import callbacks_of

# (average, what is trained, how many were averaged) -> the next average
Average: TypeAlias = Callable[[Tensor, Tensor, Any], Tensor]


class AveragesFollow(Callback):
    """Keeps averages what they are meant to be; it stands before the user's callbacks.

    - Numbers that are not trained stay as they are. Lightning averages buffers too, and whole
      numbers, as a Swin's table of relative positions, would be rounded down to others.
    - Until the first update, which may come late, the average is what is trained. Lightning would
      validate, save and end with the weights that the run began with.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Has the averages leave out what does not change."""
        for average in averages_of(trainer):
            # none where torch averages lists of tensors, which refuse whole numbers
            if average.avg_fn is not None:
                average.avg_fn = without_constants(average.avg_fn)

    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the average takes the weights' place."""
        follow(trainer, module)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before the average is saved."""
        follow(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the average takes the weights' place for good."""
        follow(trainer, module)


def averages_of(trainer: Trainer) -> list[AveragedModel]:
    """Returns the averaged models of a fit; private in Lightning, which shows them nowhere."""
    callbacks = callbacks_of(trainer, WeightAveraging)
    averages = [callback._average_model for callback in callbacks]
    return [average for average in averages if average is not None]


def without_constants(average: Average) -> Average:
    """Returns an average that keeps whole numbers, and numbers that both sides have."""

    def average_changes(old: Tensor, new: Tensor, count: Any) -> Tensor:
        if not new.is_floating_point():
            return new
        # by elements: to compare whole tensors would wait for the device
        return torch.where(old == new, new, average(old, new, count))

    return average_changes


@torch.no_grad()
def follow(trainer: Trainer, module: LightningModule) -> None:
    """Gives averages that were never updated the weights of now."""
    for average in averages_of(trainer):
        if average.n_averaged == 0:
            averaged = chain(average.module.parameters(), average.module.buffers())
            trained = chain(module.parameters(), module.buffers())
            for old, new in zip(averaged, trained, strict=True):
                old.copy_(new)


def take_averages(trainer: Trainer, module: LightningModule) -> None:
    """Puts averaged weights in their place after a fit in which no step was left: Lightning's
    callback does so at the end of a training alone."""
    follow(trainer, module)
    for callback in callbacks_of(trainer, WeightAveraging):
        callback.on_train_end(trainer, module)
