"""How a checkpoint comes onto the disk: beside its place, renamed when it is whole, at once or in the background."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from owlfuse.parallel import Sharded
from owlfuse.parallel_checkpoints import every_rank, failures_of, in_memory
from owlfuse.runs import put_in_place, remove
from owlfuse.types import DataError

log = logging.getLogger(__name__)


class FileWriter(TorchCheckpointIO):
    """Leaves in `write` what writes a checkpoint straight into its file: Lightning would pass it through memory.

    Args:
        background: it is copied now, and written as it is now whatever becomes of the weights.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self.write: Callable[[], None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `CheckpointIO`."""
        self.write = partial(to_file, in_memory(checkpoint) if self.background else checkpoint, Path(path))


def to_file(checkpoint: dict[str, Any], path: Path) -> None:
    """One file."""
    with path.open("wb") as file:
        torch.save(checkpoint, file)


class Writes:
    """Writes a run's checkpoints, one at a time.

    Args:
        background: training goes on while a copy of the checkpoint on the CPU is written by a thread of each rank.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if background else None
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
        """Saves beside `path` (`.part`), and renames when all is on the disk, its manifest with it. All ranks call it. In the
        background it returns as soon as the one before is written and this one is copied.

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
        """Waits for the pending write. All ranks call it. Raises DataError, on every rank, where it failed on any."""
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
    write: Callable[[], None] | None, path: Path, rows: bytes | None, first: bool, after: Callable[[], None] | None
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
    """Raises on every rank what failed on any: DataError where it is about writing, else the error itself where it arose."""
    error = future.exception()
    rank, reason = next(
        ((rank, reason) for rank, reason in enumerate(every_rank(trainer, said(error) if error else None)) if reason), (0, None)
    )
    if reason is None:
        return
    if error is not None and why_not_written(error) is None:
        raise error
    where = f" by rank {rank}" if trainer.world_size > 1 else ""
    raise DataError(
        f"{path} could not be written{where}: {reason}; the checkpoints before it are intact, so make room and go on with "
        f"resume={trainer.default_root_dir}"
    ) from error


def said(error: BaseException) -> str:
    """One line."""
    return why_not_written(error) or f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]


def why_not_written(error: BaseException) -> str | None:
    """What the system said, which torch hides behind an error of its own; None: it is not about writing."""
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
