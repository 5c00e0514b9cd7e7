"""The ranks that share the work of an evaluation: batches are dealt out to them in turn, and every
rank gets all results in the order of the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy

from owlfuse.parallel.checkpoints import gather_objects, leave, new_gloo_group, raised_together
from owlfuse.parallel.collectives import data_rank, data_ranks
from owlfuse.parallel.strategies import strategy_timeout

BatchT = TypeVar("BatchT")
PreparedT = TypeVar("PreparedT")
ResultT = TypeVar("ResultT")


@dataclass
class Ranks:
    """This process among those that share the work; by default it has all of it.

    Args:
        rank: of the ranks with rows of their own, which this one is; tensor ranks of the same rows
            have the same number and do the same work.
        count: how many have rows of their own.
        group: of all processes on the CPU, where a message never waits for a device; None for one
            process.
        lockstep: a forward pass needs all ranks at the same time, as that of a sharded model does.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    lockstep: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes results."""
        return self.group is None or dist.get_rank() == 0

    @property
    def synced_generation(self) -> bool:
        """Whether a rank whose answers are complete has to go on with forward passes, since others
        with other rows need it for theirs."""
        return self.lockstep and self.count > 1

    def share(self, items: list[BatchT]) -> list[BatchT]:
        """Returns every `count`-th item; those of all ranks together are all."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Waits until all ranks are here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """Returns a small object of every process, in their order."""
        return gather_objects(self.group, value)

    def gather_rows(self, value: Any) -> list[Any]:
        """Returns a small object of each rank with rows of its own, in their order."""
        by_rank: dict[int, Any] = {}
        for rank, rank_value in self.gather((self.rank, value)):
            # Tensor ranks of the same rows have made the same.
            by_rank.setdefault(rank, rank_value)
        return [by_rank[rank] for rank in range(self.count)]

    def failing_together(self) -> AbstractContextManager[None]:
        """Raises an error of the block on every rank, so that none waits for one that has failed.

        Raises:
            DataError: on the ranks that have not failed themselves.
        """
        return raised_together(self.group)

    def deal(
        self,
        batches: Sequence[BatchT],
        prepare: Callable[[BatchT], PreparedT],
        compute: Callable[[PreparedT], ResultT] | None = None,
    ) -> Iterator[ResultT]:
        """Yields on every rank the result of each batch, in their order. Batch k is the work of
        rank k % count, so that no batch holds other rows than it would for one process.

        Ranks wait for each other after every batch: they are never further apart than one, whatever
        time the whole takes, and one that has failed ends the others at once.

        Args:
            prepare: what needs no other rank.
            compute: what a sharded model needs all ranks for; by default what `prepare` returns is
                the result.

        Raises:
            DataError: on the ranks that have not failed themselves, where another has.
        """
        for start in range(0, len(batches), self.count):
            number = start + self.rank
            works = number < len(batches)
            if self.lockstep and not works:
                # The others' forward passes need this rank's; what it computes is dropped.
                number, works = len(batches) - 1, True
            with self.failing_together():
                prepared: Any = prepare(batches[number]) if works else None
            if compute is None:
                result = prepared
            elif self.lockstep:
                # An error is raised at once: the others are in the middle of a collective that this
                # rank has left, and would not come to hear of it. It ends them.
                result = compute(prepared)
            else:
                with self.failing_together():
                    result = compute(prepared) if works else None
            # In the last round some ranks have no batch, or repeat one.
            yield from self.gather_rows(result)[: len(batches) - start]


@contextmanager
def evaluation_ranks(trainer: Trainer) -> Iterator[Ranks]:
    """Yields the ranks of a trainer's strategy. All of them enter the block together."""
    if trainer.world_size == 1 or not dist.is_initialized():
        yield Ranks()
        return
    strategy: Any = trainer.strategy
    group = new_gloo_group(strategy_timeout(strategy))
    # Replicated ranks compute alone; any other strategy may have split the model.
    lockstep = not isinstance(strategy, DDPStrategy)
    yield Ranks(data_rank(trainer), data_ranks(trainer), group, lockstep)
    # Not after an error: another rank may be in the middle of a message, and leaving would wait.
    leave(group)
