"""Samples by position or number, encoded, as torch's DataLoader asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, Sampler

from owlfuse.core.errors import DataError, one_line
from owlfuse.core.types import Encoded, Sample, Skipped
from owlfuse.data.formats.base import Source
from owlfuse.data.mixture.mixture import Mixture

# Positions that are looked up at a time: few for the first batch, then twice as many each time, at
# most 2.6 MB.
FIRST_BLOCK, BLOCK = 2**12, 2**18


@dataclass
class MixtureDataset(Dataset):
    """The samples at positions of the mixture's schedule.

    Positions are looked up in blocks, which takes nanoseconds each where one alone takes tens of
    microseconds. A block is cached for the micro batches that follow.
    """

    mixture: Mixture
    sources: dict[str, Source]
    load: Callable[[Sample, Source], Encoded]

    def __post_init__(self) -> None:
        self.start = 0
        self.block: tuple[np.ndarray, np.ndarray] = np.empty(0, np.uint16), np.empty(0, np.int64)

    def __getitems__(self, positions: Sequence[int]) -> list[Encoded | Skipped]:
        """Return a micro batch, which torch asks for as a whole. Raises DataError."""
        items = []
        for name, index in self.draws(positions):
            items.append(load_or_skip(self.load, self.sources[name], index))
        return items

    def draws(self, positions: Sequence[int]) -> list[tuple[str, int]]:
        """Return (name of the source, index of the sample) at each of some positions that are close
        together.

        Raises:
            IndexError: after the schedule's end.
        """
        # The sampler asks for ranges, whose ends need no search.
        is_range = isinstance(positions, range) and positions.step == 1 and bool(positions)
        if is_range:
            first, stop = positions[0], positions[-1] + 1
        else:
            first, stop = min(positions), max(positions) + 1
        if first < self.start or stop > self.start + len(self.block[0]):
            size = max(FIRST_BLOCK, 2 * len(self.block[0]))
            ahead = first + min(BLOCK, size)
            # Where the schedule ends before `stop`, `positions` says so.
            last = max(stop, self.mixture.available(ahead))
            self.block = self.mixture.positions(first, last)
            self.start = first
        sources, indices = self.block
        inside = slice(first - self.start, stop - self.start)
        names = map(self.mixture.names.__getitem__, sources[inside].tolist())
        draws = list(zip(names, indices[inside].tolist()))
        if is_range:
            return draws
        return [draws[position - first] for position in positions]


@dataclass
class SourceDataset(Dataset):
    """Samples of one source, by their indices."""

    source: Source
    indices: Sequence[int]
    load: Callable[[Sample, Source], Encoded]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Encoded | Skipped:
        return load_or_skip(self.load, self.source, self.indices[number])


def load_or_skip(
    load: Callable[[Sample, Source], Encoded], source: Source, index: int
) -> Encoded | Skipped:
    """Load a sample of a source under its policy for wrong samples.

    Raises DataError where the policy is to stop.
    """
    try:
        return load(source[index], source)
    except DataError as error:
        error = source.with_location(error, source.first_record(index))
        # Messages hold ids and paths of the data, which may have line breaks.
        reason = one_line(str(error))
        # `leave_out`: the policy for long chats is by length and not by source.
        if source.on_error == "skip" or error.leave_out:
            return Skipped(source.name, f"{source.name}:{index}", reason)
        raise DataError(reason) from error


def batches_of_rank(samples: int, batch_size: int, rank: int, ranks: int) -> list[range]:
    """Return the numbers of the samples in each batch of one rank: batch k is rank k % ranks'.

    All ranks get equally many batches, as the collectives of a forward pass need it. Those beyond
    the last sample are empty, and the collator makes a row of them on which nothing is supervised.
    """
    batches = []
    for round_start in range(0, samples, batch_size * ranks):
        first = round_start + rank * batch_size
        batches.append(range(samples)[first : first + batch_size])
    return batches


@dataclass
class GlobalBatchSampler(Sampler[range]):
    """Yields the positions of one rank's micro batches. A step takes the next G positions, G the
    global batch size, whatever the number of ranks; micro batches go to the ranks in turn.

    Its length is that of all steps, and it starts at `first_step`, which is how Lightning counts a
    resumed epoch.

    Args:
        first_position: of the first step's first sample; by default all steps before it took G
            samples too.
    """

    global_batch_size: int
    accumulation: int
    rank: int
    ranks: int
    steps: int
    first_step: int = 0
    first_position: int | None = None

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[range]:
        micro_batch_size = self.global_batch_size // (self.accumulation * self.ranks)
        step_start = self.first_position
        if step_start is None:
            step_start = self.first_step * self.global_batch_size
        for _ in range(self.first_step, self.steps):
            for micro_batch in range(self.accumulation):
                number = micro_batch * self.ranks + self.rank
                first = step_start + number * micro_batch_size
                # a range, which `draws` looks up by its ends
                yield range(first, first + micro_batch_size)
            step_start += self.global_batch_size
