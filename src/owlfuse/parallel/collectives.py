"""What processes tell each other: sums, gathered rows and objects, and who has which part of the
data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from owlfuse.parallel.checkpoints import gather_objects, leave, new_gloo_group, world_group
from owlfuse.parallel.strategies import Sharded, strategy_timeout


def data_ranks(trainer: Trainer) -> int:
    """Ranks that have rows of their own, known before the processes talk to each other."""
    strategy = trainer.strategy
    return strategy.sizes()[0] if isinstance(strategy, Sharded) else trainer.world_size


def data_rank(trainer: Trainer) -> int:
    """Which of the `data_ranks` this process is; tensor ranks of the same rows are the same."""
    sampler_options = trainer.distributed_sampler_kwargs
    return sampler_options["rank"] if sampler_options else 0


def data_group(trainer: Trainer) -> Any:
    """The process group of the ranks with rows of their own, None for one process."""
    strategy = trainer.strategy
    if isinstance(strategy, Sharded):
        return strategy.device_mesh["data_parallel"].get_group()
    return world_group(strategy)


class SharedFlag:
    """A flag that goes up on every rank at the same step, one after it went up on any.

    Ranks tell each other of it on the CPU, while they compute the next step: reading it never waits
    for a device, and for another rank only where that is more than a step behind. One process reads
    its flag at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.group: Any = None
        if trainer.world_size > 1 and dist.is_initialized():
            self.group = new_gloo_group(strategy_timeout(trainer.strategy))
        self.pending: tuple[Tensor, Any] | None = None

    def exchange(self, flag: bool) -> bool:
        """Tells the other ranks of this rank's flag; returns whether any rank's was up at the
        call before. All ranks call it."""
        if self.group is None:
            return flag
        was_up = self.read()
        value = torch.tensor(int(flag))
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = value, work
        return was_up

    def read(self) -> bool:
        """Returns whether any rank's flag was up at the last `exchange`, and forgets it."""
        if self.pending is None:
            return False
        value, work = self.pending
        self.pending = None
        work.wait()
        return bool(value)

    def settle(self, flag: bool) -> bool:
        """Returns whether the flag is up on any rank now, when no step follows. All ranks call
        it."""
        if self.group is None:
            return flag
        # What was exchanged after the last step may be older than this flag.
        self.read()
        self.exchange(flag)
        return self.read()

    def close(self) -> None:
        """Ends what the ranks tell each other."""
        if self.group is not None:
            leave(self.group)
            self.group = None


def all_gather_rows(trainer: Trainer, row: Tensor) -> Tensor:
    """A vector (n,) of each data rank, stacked: (ranks, n). For one process (1, n)."""
    group = data_group(trainer)
    if group is None:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    # a view may have gaps, which collectives do not take
    dist.all_gather(rows, row.contiguous(), group=group)
    return torch.stack(rows)


def all_gather_objects(trainer: Trainer, value: Any) -> list[Any]:
    """A small object of each data rank, in their order."""
    return gather_objects(data_group(trainer), value)


def in_float64(tensor: Tensor) -> Tensor:
    """Returns the tensor in float64, on the CPU where it is on a GPU of Apple's, which has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def local(tensor: Tensor) -> Tensor:
    """A rank's own part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor; of one that is sharded, all ranks take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Returns whether a module's parameters are split over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def divide(gradients: Sequence[Tensor], divisor: Tensor) -> None:
    """Divides gradients in place, each rank its own parts."""
    # torch's foreach functions refuse an empty list.
    if gradients:
        torch._foreach_div_([local(gradient) for gradient in gradients], divisor)


def copies(tensor: Tensor) -> int:
    """How many ranks hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        # A plain tensor is the same on all ranks.
        return dist.get_world_size()
    placed = list(zip(tensor.placements, tensor.device_mesh.shape, strict=True))
    # The mesh may be a part of the ranks only: those of the data beside tensor ranks.
    outside = dist.get_world_size() // tensor.device_mesh.size()
    return outside * math.prod(size for placement, size in placed if placement.is_replicate())


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, over all ranks' parts."""
    parts = [local(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(parts))
    # Replicated gradients are added up by now, so that each rank has the norm of all.
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.linalg.vector_norm(norms)
    # A part that several ranks hold counts once.
    total = (
        norms.double().square()
        / torch.tensor([copies(gradient) for gradient in gradients]).to(norms)
    ).sum()
    dist.all_reduce(total)
    return total.sqrt().to(norms)


def clip(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scales gradients in place so that their norm, which is `norm`, is at most `limit`, as torch's
    `clip_grad_norm_`."""
    torch._foreach_mul_(
        [local(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0)
    )


def all_reduce_gradients(parameters: Iterable[nn.Parameter], strategy: Any) -> None:
    """Adds up the gradients of parameters that every tensor rank has whole and uses for its own
    heads only."""
    if not isinstance(strategy, Sharded) or strategy.device_mesh["tensor_parallel"].size() == 1:
        return
    group = strategy.device_mesh["tensor_parallel"].get_group()
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(local(parameter.grad), group=group)
