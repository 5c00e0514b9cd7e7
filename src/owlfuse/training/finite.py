"""A loss that is no finite number ends the run, before a checkpoint is written over a good one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from owlfuse.artifacts.runs import checkpoints_of
from owlfuse.core.errors import DataError

# above the number of any step, and within int64
NEVER = 2**62


class FiniteWatch:
    """Notes on the device which step was the first with a loss, or a norm of gradients, that is no
    finite number. Reading it waits for the device, so it is read where the loss is read anyway and
    before a checkpoint is written."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.told = False
        """Whether the run ends by it."""

    def note(self, value: Tensor, step: int) -> None:
        """Notes a value of a step, the same on every rank."""
        # without a branch, which would wait for the device
        here = torch.where(torch.isfinite(value.detach()), NEVER, step)
        self.first = here if self.first is None else torch.minimum(self.first, here)

    def check(self, folder: Path) -> None:
        """Raises DataError, on every rank alike, where a value was no finite number."""
        if self.first is None or (step := int(self.first)) == NEVER:
            return
        self.told = True
        has_checkpoint = bool(checkpoints_of(folder / "checkpoints"))
        again = (
            f"go on from the last checkpoint by resume={folder}" if has_checkpoint else "begin anew"
        )
        raise DataError(
            f"step {step}: the loss of its global batch, or the norm of its gradients, is no "
            "finite number, so no checkpoint "
            f"is written after it; {again} with a smaller optim.lr, more optim.warmup_steps, or "
            "trainer.precision=32-true"
        )
