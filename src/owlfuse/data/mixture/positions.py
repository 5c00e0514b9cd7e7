"""Where optimizer steps stand in the stream of samples, also where the global batch was changed
when a run went on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence


class StepPositions:
    """The position of each optimizer step's first sample in the global stream.

    The stream is counted in samples, so that a run which goes on with another global batch takes up
    the very next sample.

    Args:
        changes: (first step, position of its first sample, samples of a global batch from it on),
            in ascending order; the first one is of step 0 and position 0.
    """

    def __init__(self, changes: Iterable[Sequence[int]]) -> None:
        self.changes = []
        for step, position, size in changes:
            self.changes.append((int(step), int(position), int(size)))
        starts_at_zero = bool(self.changes) and self.changes[0][:2] == (0, 0)
        if not starts_at_zero or any(size < 1 for _, _, size in self.changes):
            raise ValueError(
                "expected global batches of at least 1 sample, the first at step 0, not "
                f"{self.changes}"
            )

    @classmethod
    def of(cls, global_batch_size: int) -> StepPositions:
        """Return the positions of global batches that all have one size."""
        return cls([(0, 0, global_batch_size)])

    def position(self, step: int) -> int:
        """Return how many samples the steps before this one took."""
        first_steps = [change[0] for change in self.changes]
        first_step, first_position, size = self.changes[bisect_right(first_steps, step) - 1]
        return first_position + (step - first_step) * size

    def step(self, position: int) -> float:
        """Return the step that takes the sample at a position; a fraction where the sample is not
        the step's first."""
        first_positions = [change[1] for change in self.changes]
        first_step, first_position, size = self.changes[bisect_right(first_positions, position) - 1]
        return first_step + (position - first_position) / size

    def changed(self, step: int, global_batch_size: int) -> StepPositions:
        """Return these positions until a step, and global batches of another size from it on."""
        # Nothing has been drawn yet.
        if step == 0:
            return StepPositions.of(global_batch_size)
        # A change at this very step is of a run that went on and took none.
        changes = [change for change in self.changes if change[0] < step]
        if changes[-1][2] != global_batch_size:
            changes.append((step, self.position(step), global_batch_size))
        return StepPositions(changes)
