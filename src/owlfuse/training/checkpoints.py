"""Checkpoints of a run: when they are written, and with which random states.

How: `writes`; the model in them: `weights`.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch.nn.modules.batchnorm import _BatchNorm

from owlfuse.artifacts.runs import checkpoints_of, put_in_place, remove
from owlfuse.core.errors import DataError
from owlfuse.parallel.checkpoints import every_rank, failures_of, in_memory
from owlfuse.parallel.collectives import data_rank, data_ranks
from owlfuse.parallel.strategies import Sharded

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/step_<n>.ckpt` of a run, the newest ones, each written beside and renamed
    when it is whole.

    Between two steps the random states stand as the step left them: validation and saving use up
    none. Those of every rank are kept, and given back to it where as many ranks share the rows as
    before.

    Args:
        every: optimizer steps between two checkpoints; None: one at each validation. There is one
            at the end in any case.
        keep: how many of the newest are kept.
        background: training goes on while a checkpoint is written. It takes memory on the CPU for a
            copy of what is trained and of the optimizer's state, which no plan counts, and an error
            is told at the next checkpoint only; so it is asked for.
    """

    def __init__(self, every: int | None = None, keep: int = 2, background: bool = False) -> None:
        if every is not None and every < 1:
            raise ValueError(
                f"checkpoint.every is {every}, expected at least 1 optimizer step, or null"
            )
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}, expected at least 1")
        self.every = every
        self.keep = keep
        self.writes = Writes(background)
        self.saved: int | None = None
        self.validated = False
        self.random: dict[str, Any] | None = None
        self.random_of_step: dict[str, Any] | None = None
        """As the last whole step left them; `random` is of the last micro batch."""
        self.statistics: tuple[int, list[torch.Tensor]] = (0, [])
        """A step, and the statistics of batch norms as it found them, which a forward pass
        changes before its step is whole."""
        self.count = 0
        self.can_write = True

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """See `Writes.setup`."""
        self.writes.setup(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The random states of every rank as of the step."""
        checkpoint["random_states"] = every_rank(trainer, self.random or random_states())
        checkpoint["data_ranks"] = data_ranks(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See `on_save_checkpoint`; they are set when the next batch begins, after all that is
        built until then."""
        states, ranks = checkpoint.get("random_states"), data_ranks(trainer)
        if states is None:  # of runs that kept those of the first rank only
            states = [checkpoint["callbacks"][self.state_key]["random"]]
        if len(states) == trainer.world_size and checkpoint.get("data_ranks", 1) == ranks:
            self.random = states[trainer.global_rank]
            return
        self.random = derived_states(
            torch.initial_seed(), data_rank(trainer), checkpoint["global_step"]
        )
        if trainer.is_global_zero:
            log.warning(
                "the checkpoint is of %d ranks, %s of them with rows of their own, and %d (%d) go "
                "on: their random states are "
                "made anew from seed, rank and step, and dropout differs from that of a run never "
                "stopped",
                *(len(states), checkpoint.get("data_ranks", "?"), trainer.world_size, ranks),
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A run that goes on need not write again what it was read from.

        Ranks that begin with other rows drop out others.
        """
        self.saved = trainer.global_step or None
        self.random_of_step = self.random
        if self.random is None and data_rank(trainer):
            self.random = derived_states(
                torch.initial_seed(), data_rank(trainer), trainer.global_step
            )

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step before, which is whole only now: logged, and validated where validation
        was due."""
        if self.random is not None:
            set_random_states(self.random)
        step = trainer.global_step
        if trainer.world_size == 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            self.statistics = step, [buffer.clone() for buffer in statistics_of(module)]
        due = self.validated if self.every is None else step % self.every == 0
        if due and step and batch_idx % trainer.accumulate_grad_batches == 0:
            self.save(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the random states as the micro batch left them."""
        self.random = random_states()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.random_of_step = self.random

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation makes a checkpoint due."""
        self.validated = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves, waits until all is written, and says what saving took.

        Raises DataError as `save` does.
        """
        self.save(trainer, module)
        began = time.monotonic()
        self.writes.finish(trainer)
        seconds = self.writes.seconds + time.monotonic() - began
        if trainer.is_global_zero and self.count:
            how = " in the background; training waited for" if self.writes.background else " in"
            print(f"{self.count} checkpoint{'s' * (self.count > 1)} written{how} {seconds:.1f} s")

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        """What is being written is not broken off, and the last whole step gets a checkpoint.

        Not of several processes, of which the others may wait elsewhere: they go on from the
        checkpoint before. Not after a second Ctrl-C, which asks for the end at once.
        """
        self.writes.leave()
        step = trainer.global_step
        if (
            trainer.world_size > 1
            or not self.can_write
            or not step
            or isinstance(exception, KeyboardInterrupt)
        ):
            return
        if module.finite.told:
            return
        if module.updating:
            log.error(
                (
                    "the update after step %d was broken off; the last checkpoint before it is "
                    "what "
                    "is left"
                ),
                step,
            )
            return
        self.random = self.random_of_step
        if self.statistics[0] == step:
            for buffer, before in zip(statistics_of(module), self.statistics[1]):
                buffer.copy_(before)
        try:
            self.save(trainer, module)
            self.writes.finish(trainer)
        except DataError as error:
            log.error("%s", error)

    def save(self, trainer: Trainer, module: Any) -> None:
        """Writes the checkpoint of the trainer's step, unless it is there, and deletes those beyond
        `keep`. All ranks call it.

        Raises:
            DataError: it, or the one before, could not be written, or a loss was no finite number;
                the ones before are intact.
        """
        self.validated = False
        step = trainer.global_step
        if step == self.saved:
            return
        module.finite.check(Path(trainer.default_root_dir))
        path = Path(trainer.default_root_dir) / "checkpoints" / f"step_{step:08}.ckpt"
        self.can_write = False  # until it is written: after an error of writing none is tried again
        self.writes.write(trainer, path, partial(delete_beyond, self.keep, path))
        self.can_write = True
        self.saved, self.count = step, self.count + 1


def statistics_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """The buffers of the batch norms that learn by forward passes."""
    norms = (norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training)
    return [buffer for norm in norms for buffer in norm.buffers()]


def delete_beyond(keep: int, newest: Path) -> None:
    """Deletes all but the newest checkpoints; `newest` stands whole in its place."""
    found = checkpoints_of(newest.parent)
    # later ones were bad, or this run would have gone on from them
    kept = [other for other in found if other.name <= newest.name][:keep]
    for other in set(found) - set(kept):
        remove(other)


class Best(Checkpoint):
    """Keeps `checkpoints/best.ckpt`, of the validation with the lowest value of the metric
    `watched`."""

    def __init__(self, watched: str, writes: Writes) -> None:
        self.watched = watched
        self.writes = writes
        self.lowest = float("inf")

    def state_dict(self) -> dict[str, Any]:
        """The lowest value so far."""
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.lowest = state_dict["lowest"]

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves where the metric fell. Raises DataError where it cannot be written."""
        value = float(trainer.callback_metrics.get(self.watched, float("inf")))
        if value < self.lowest:
            self.lowest = value
            self.writes.write(trainer, Path(trainer.default_root_dir) / "checkpoints" / "best.ckpt")


def derived_states(seed: int, rank: int, step: int) -> dict[str, Any]:
    """Random states made of three numbers; the present ones stay."""
    present = random_states()
    numbers = [
        int(number) for number in np.random.SeedSequence([seed, rank, step]).generate_state(3)
    ]
    random.seed(numbers[0])
    np.random.seed(numbers[1])
    torch.manual_seed(numbers[2])
    states = random_states()
    set_random_states(present)
    return states


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and this rank's CUDA device, in types that
    `torch.load(weights_only=True)` reads."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    states: dict[str, Any] = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {**states, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Those of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])


class FileWriter(TorchCheckpointIO):
    """Leaves in `write` what writes a checkpoint straight into its file: Lightning would pass it
    through memory.

    Args:
        background: it is copied now, and written as it is now whatever becomes of the weights.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self.write: Callable[[], None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """See `CheckpointIO`."""
        self.write = partial(
            to_file, in_memory(checkpoint) if self.background else checkpoint, Path(path)
        )


def to_file(checkpoint: dict[str, Any], path: Path) -> None:
    """One file."""
    with path.open("wb") as file:
        torch.save(checkpoint, file)


class Writes:
    """Writes a run's checkpoints, one at a time.

    Args:
        background: training goes on while a copy of the checkpoint on the CPU is written by a
            thread of each rank.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self.thread = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            if background
            else None
        )
        self.writer: Sharded | FileWriter | None = None
        self.pending: tuple[Path, Future[None]] | None = None
        self.seconds = 0.0
        """For which training waited."""

    def setup(self, trainer: Trainer) -> None:
        """Lightning collects a checkpoint; writing it is left to `write`."""
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.background = self.background
            self.writer = trainer.strategy
            return
        with suppress(NotImplementedError):  # a strategy that writes by itself, at once
            if isinstance(trainer.strategy.checkpoint_io, TorchCheckpointIO):
                self.writer = trainer.strategy.checkpoint_io = FileWriter(self.background)

    def write(self, trainer: Trainer, path: Path, after: Callable[[], None] | None = None) -> None:
        """Saves beside `path` (`.part`), and renames when all is on the disk, its manifest with it.
        All ranks call it. In the background it returns as soon as the one before is written and
        this one is copied.

        Args:
            after: what the first rank does when the checkpoint stands in its place.

        Raises:
            DataError: it, or the one before, could not be written; what was there is intact.
        """
        began = time.monotonic()
        self.finish(trainer)
        path, first = Path(trainer.strategy.broadcast(path)), trainer.is_global_zero
        part = path.with_name(path.name + ".part")
        ready: Future[bytes | None] = attempt(partial(begin, trainer, part) if first else no_rows)
        agree(trainer, path, ready)
        trainer.save_checkpoint(part, weights_only=False)  # said, or Lightning says it at each
        write = self.writer.write if self.writer is not None else None
        whole = partial(complete, write, path, ready.result(), first, after)
        if self.writer is not None:
            self.writer.write = None  # it holds the copy
        self.pending = path, self.thread.submit(whole) if self.thread else attempt(whole)
        if not self.thread:
            self.finish(trainer)
        self.seconds += time.monotonic() - began
        log.info("saving %s took %.2f s of training's time", path, time.monotonic() - began)

    def finish(self, trainer: Trainer) -> None:
        """Waits for the pending write.

        All ranks call it. Raises DataError, on every rank, where it failed on any.
        """
        if self.pending is not None:
            path, future = self.pending
            wait([future])
            self.pending = None
            agree(trainer, path, future)

    def leave(self) -> None:
        """Waits for the pending write of this rank, of a run that ends by another error."""
        if self.pending is not None:
            path, future = self.pending
            if error := future.exception():
                log.error("%s could not be written either: %s", path, said(error))
            self.pending = None


def begin(trainer: Trainer, part: Path) -> bytes | None:
    """Makes room, and gives metrics.csv as it is now, which a kill may leave half written later."""
    part.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    for logger in trainer.loggers:
        logger.save()
    source = Path(trainer.default_root_dir) / "metrics.csv"
    return source.read_bytes() if source.exists() else None


def no_rows() -> None:
    """Of a rank that has no metrics.csv."""


def complete(
    write: Callable[[], None] | None,
    path: Path,
    rows: bytes | None,
    first: bool,
    after: Callable[[], None] | None,
) -> None:
    """Writes this rank's part; the first rank then puts the whole into its place."""
    part = path.with_name(path.name + ".part")
    try:
        if write is not None:  # where one file is written the other ranks have nothing to do
            write()
        if first:
            if rows is not None and path.name.startswith("step_"):
                path.with_suffix(".csv").write_bytes(rows)
            put_in_place(part, path)
            if after is not None:
                after()
    except BaseException:
        if first:
            remove(part)
        raise


def attempt(call: Callable[[], Any]) -> Future[Any]:
    """What a call gives or raises."""
    future: Future[Any] = Future()
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
    return future


def agree(trainer: Trainer, path: Path, future: Future[Any]) -> None:
    """Raises on every rank what failed on any:

    DataError where it is about writing, else the error itself where it arose.
    """
    error = future.exception()
    rank, reason = next(
        (
            (rank, reason)
            for rank, reason in enumerate(every_rank(trainer, said(error) if error else None))
            if reason
        ),
        (0, None),
    )
    if reason is None:
        return
    if error is not None and disk_error_reason(error) is None:
        raise error
    where = f" by rank {rank}" if trainer.world_size > 1 else ""
    raise DataError(
        f"{path} could not be written{where}: {reason}; the checkpoints before it are intact, so "
        "make room and go on with "
        f"resume={trainer.default_root_dir}"
    ) from error


def said(error: BaseException) -> str:
    """One line."""
    return disk_error_reason(error) or f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]


def disk_error_reason(error: BaseException) -> str | None:
    """What the system said, which torch hides behind an error of its own; None: it is not about
    writing."""
    for failure in failures_of(error):
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OSError):
                return os.strerror(cause.errno) if cause.errno else str(cause)
            cause = cause.__cause__ or cause.__context__
        first_line = str(failure).splitlines()[0] if str(failure) else ""
        if any(word in first_line for word in ("Writer", "inline_container", "failed writing")):
            return first_line
    return None
