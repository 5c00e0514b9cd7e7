"""After the first steps: every part that is meant to train has moved, and nothing that is frozen
has changed."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from owlfuse.model.adapters import PARTS
from owlfuse.parallel.collectives import local

log = logging.getLogger(__name__)
CHUNK = 2**24
"""Numbers that are summed up at a time."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their size in bytes."""


class Watched(NamedTuple):
    """A parameter, or a buffer of a part that is frozen as a whole."""

    part: str
    name: str
    trained: bool


class FirstStepsCheck(Callback):
    """Compares checksums of every parameter, computed where it lies, before the first step and
    after a few. Of a sharded one each rank looks at its own shard.

    Of a part those steps count at which its learning rate is above 0 and, but for the LLM, a
    picture is seen. A part that has not moved after `steps` of them is looked at again after
    `patience`: at the start of a long warm-up, updates may be smaller than the last bit of the
    parameters.
    """

    def __init__(self, steps: int = 2, patience: int = 50) -> None:
        self.steps = steps
        self.patience = patience

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Notes the checksums (a resumed run has its checkpoint by now), and that the optimizer
        has all that is to train."""
        self.watched = watched_tensors(module.model)
        self.before = checksums(self.watched)
        self.pending = {watched.part for watched in self.watched if watched.trained}
        self.frozen_checked = False
        self.counted = dict.fromkeys(PARTS, 0)
        self.picture_seen = False
        groups = trainer.optimizers[0].param_groups
        # by identity, since tensors are compared number by number
        group_ids = [{id(parameter) for parameter in group["params"]} for group in groups]
        self.groups: dict[str, list[int]] = {part: [] for part in PARTS}
        for watched, tensor in self.watched.items():
            if watched.trained:
                indices = [index for index, ids in enumerate(group_ids) if id(tensor) in ids]
                if not indices:
                    raise RuntimeError(
                        f"part {watched.part}: {watched.name} is meant to train, and the "
                        "optimizer lacks it"
                    )
                self.groups[watched.part] += indices
        self.rated: set[str] = set()
        for part in self.pending:
            part_groups = [groups[index] for index in self.groups[part]]
            # the peak: a warm-up begins at 0
            if not any(group.get("initial_lr", group["lr"]) for group in part_groups):
                raise RuntimeError(
                    f"part {part} is meant to train, and its learning rate (optim.lr, "
                    "optim.part_lr) is 0"
                )

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes whether the step sees a picture."""
        self.picture_seen |= bool(batch.has_images)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Counts the step for the parts that it can move."""
        self.due: set[str] = set()
        for part in self.pending:
            rate = max(optimizer.param_groups[index]["lr"] for index in self.groups[part])
            if rate > 0:
                self.rated.add(part)
            if rate > 0 and (part == "llm" or self.picture_seen):
                self.counted[part] += 1
                if self.counted[part] in (self.steps, self.patience):
                    self.due.add(part)
        self.picture_seen = False

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks the parts of which enough steps were counted."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self.pending and self.due:
            self.check(self.due)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A run of fewer steps is checked for what is frozen at its end, and for parts that had
        no step to move in."""
        if not self.frozen_checked:
            self.check(set())
        if still := sorted(self.pending - self.rated):
            log.warning(
                "no step had a learning rate above 0 for %s; see optim.warmup_steps",
                ", ".join(still),
            )

    def check(self, parts: set[str]) -> None:
        """Looks at what is frozen, the first time, and at the trained parameters of the parts.

        Raises:
            RuntimeError: the part and the parameter that changed or did not.
        """
        due = {}
        for watched, tensor in self.watched.items():
            # Frozen ones are compared once, since it means reading all of them.
            is_due = not self.frozen_checked
            if watched.trained:
                is_due = watched.part in parts
            if is_due:
                due[watched] = tensor

        now = checksums(due)
        changed = {watched for watched in due if now[watched] != self.before[watched]}
        for watched in changed:
            if not watched.trained:
                raise RuntimeError(
                    f"part {watched.part}: {watched.name} is frozen, and the first steps have "
                    "changed it"
                )
        self.frozen_checked = True
        for part in parts:
            still = [
                watched.name
                for watched in due
                if watched.part == part and watched.trained and watched not in changed
            ]
            if any(watched.part == part for watched in changed):
                self.pending.discard(part)
                log.info("part %s moves; not yet: %s", part, ", ".join(still) or "nothing")
            elif self.counted[part] >= self.patience:
                raise RuntimeError(
                    f"part {part} is meant to train, and {self.patience} steps have not moved it, "
                    f"{still[0]} for one; look at "
                    "its learning rate (optim.lr, optim.part_lr) and at the precision"
                )


def watched_tensors(model: Any) -> dict[Watched, Tensor]:
    """All parameters of the parts as they are on this rank, and buffers of a backbone or connector
    that is frozen as a whole, such as statistics of batch norms. A sharded table of which only some
    rows are trained is left out: another rank may hold all of these."""
    tensors: dict[Watched, Tensor] = {}
    limited = [table for table, _ in model.row_limits()]
    left_out = {id(table) for table in limited if local(table).numel() < table.numel()}
    for part in PARTS:
        parameters = {}
        trains = False
        for name, parameter in model.part(part).parameters.items():
            if id(parameter) not in left_out:
                parameters[name] = parameter
                tensors[Watched(part, name, parameter.requires_grad)] = parameter
                trains |= parameter.requires_grad
        # The buffers of a part that trains change by right, as running means do.
        if part in ("vision", "connector") and not trains:
            for name, tensor in getattr(model, part).state_dict(keep_vars=True).items():
                if name not in parameters:
                    tensors[Watched(part, name, False)] = tensor
    return {watched: tensor for watched, tensor in tensors.items() if local(tensor).numel()}


def checksums(tensors: dict[Watched, Tensor]) -> dict[Watched, int]:
    """The sum of each tensor's bits as whole numbers: exact in any order, so that it changes
    with any number."""
    sums: dict[Watched, int] = {}
    for watched, tensor in tensors.items():
        bits = local(tensor.detach()).flatten().view(BITS[tensor.element_size()])
        sums[watched] = sum(int(chunk.sum(dtype=torch.int64)) for chunk in bits.split(CHUNK))
    return sums
