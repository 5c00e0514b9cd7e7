"""Which positions of the schedule a rank takes, in which order."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[range]):
    """Positions of one rank's micro batches. A step takes the next G positions, G the global batch size, whatever the number
    of ranks; micro batches go to the ranks in turn.

    Its length is that of all steps, and it starts at `first_step`, which is how Lightning counts a resumed epoch.

    Args:
        first_position: of the first step's first sample; by default all steps before it took G samples too.
    """

    def __init__(
        self,
        global_batch_size: int,
        accumulation: int,
        rank: int,
        ranks: int,
        steps: int,
        first_step: int = 0,
        first_position: int | None = None,
    ):
        self.global_batch_size = global_batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.ranks = ranks
        self.steps = steps
        self.first_step = first_step
        self.first_position = first_step * global_batch_size if first_position is None else first_position
        self.micro_batch_size = global_batch_size // (accumulation * ranks)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[range]:
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulation):
                first = self.first_position + (step - self.first_step) * self.global_batch_size
                first += (part * self.ranks + self.rank) * self.micro_batch_size
                yield range(first, first + self.micro_batch_size)
