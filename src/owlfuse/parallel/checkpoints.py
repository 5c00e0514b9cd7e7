"""Checkpoints of many ranks: shards written and read by all of them, at once or in the
background."""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from owlfuse.core.checkpoint_files import (
    commit_checkpoint,
    find_damaged_record,
    partial_path,
    remove_checkpoint,
)
from owlfuse.core.errors import DataError
from owlfuse.core.types import without_keys

log = logging.getLogger(__name__)

META = "meta.pt"
"""What a checkpoint's folder holds beside shards, as Lightning names it."""
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
PREFIX = "state_dict.model."
"""Before the model's own names in a checkpoint's folder."""

TABLE = ".metadata"
"""torch's file of what lies where in a checkpoint's folder, a pickle."""
TABLE_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    # where Python 3.13 has the classes of pathlib
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
}
"""What torch puts into that pickle, by module; and of `torch` the types of tensors."""


class TableUnpickler(pickle.Unpickler):
    """Reads the table of a checkpoint's folder, and no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in TABLE_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, and its code was not run")


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint's folder, which reads the table with plain `pickle.load`: a
    checkpoint from elsewhere would run what it likes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """See torch's.

        Raises DataError for a table that is missing, damaged, or holds more than a table.
        """
        file = Path(self.path) / TABLE
        try:
            with file.open("rb") as opened:
                table = TableUnpickler(opened).load()
            table.storage_meta = getattr(table, "storage_meta", None) or StorageMeta()
            table.storage_meta.load_id = self.load_id
        except PICKLE_ERRORS as error:
            raise DataError(
                f"{file} is no table of a checkpoint: {' '.join(str(error).split())[:200]}"
            ) from error
        return table

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        """See torch's. The parts that this rank loads are first compared with the checksums that
        were written with them, which torch does not do.

        Raises DataError for a part that differs, or that is not in a file of the folder.
        """
        for item in plan.items:
            part = self.storage_data[item.storage_index]
            file_path = Path(self.path) / part.relative_path
            # A table from elsewhere may name a device, another folder's file, or any size.
            is_inside = Path(part.relative_path).name == part.relative_path and file_path.is_file()
            if not is_inside or not (
                0 <= part.offset <= part.offset + part.length <= file_path.stat().st_size
            ):
                raise DataError(
                    f"{Path(self.path) / TABLE} is damaged: {item.storage_index.fqn} lies in "
                    f"{str(part.relative_path)[:80]} from byte {part.offset:,} for "
                    f"{part.length:,}, and the folder has no such part; delete "
                    f"{self.path} to go on from the checkpoint before it"
                )
            with file_path.open("rb") as file:
                file.seek(part.offset)
                record = find_damaged_record(io.BytesIO(file.read(part.length)))
            if record is not None:
                raise DataError(
                    f"{file_path} is damaged: {item.storage_index.fqn} differs from its checksum; "
                    f"delete {file_path.parent} to go on from the checkpoint before it"
                )
        return super().read_data(plan, planner)


class SafePlanner(DefaultLoadPlanner):
    """torch's plan of what to read, in which values that are no tensors are plain ones, and no
    pickles of anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See torch's."""
        content = torch.load(value, weights_only=True)
        plain = io.BytesIO()
        torch.save(content, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


PICKLE_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
)
"""What a damaged or foreign pickle raises, besides what it was made to raise."""


def optimizer_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state by the parameters' names, so that a mesh that groups them otherwise
    can read it."""
    # Lightning wraps an optimizer, and torch knows the one inside.
    return get_optimizer_state_dict(
        model, getattr(optimizer, "_optimizer", optimizer), options=BY_NAME
    )


@contextmanager
def naming_damaged_parts() -> Iterator[None]:
    """Raises the DataError of a rank in place of torch's CheckpointException, which every rank
    gets."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, DataError):
                raise DataError(str(failure)) from error
        raise


@naming_damaged_parts()
def load_shards(model: nn.Module, optimizers: list[Optimizer], path: Path) -> dict[str, Any]:
    """Reads each rank's own parts of a folder that any mesh has written, in place; gives what
    stands beside the shards.

    Raises:
        DataError: a trained weight of the model is not in it, or a part is damaged.
    """
    saved = SafeReader(path).read_metadata().state_dict_metadata
    # Frozen weights are in no checkpoint.
    state = {k: v for k, v in get_model_state_dict(model).items() if f"state_dict.{k}" in saved}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(trained - set(state)):
        raise DataError(
            f"{path} has no weights for {missing[0]} and {len(missing) - 1} more that are trained"
        )
    dcp.load({"state_dict": state}, storage_reader=SafeReader(path), planner=SafePlanner())
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    for index, optimizer in enumerate(optimizers):
        moments = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
        dcp.load(
            {f"optimizer_{index}": moments}, storage_reader=SafeReader(path), planner=SafePlanner()
        )
        # of this mesh's groups, not of those that were saved
        names = [group["name"] for group in optimizer.param_groups]
        set_optimizer_state_dict(model, optimizer, moments, options=BY_NAME)
        for group, name in zip(optimizer.param_groups, names, strict=True):
            group["name"] = name
    meta = torch.load(path / META, map_location="cpu", weights_only=True)
    for schedule in meta["lr_schedulers"]:
        # Another mesh may have put the parameters into more or fewer groups.
        groups = optimizers[0].param_groups
        schedule["base_lrs"] = [group["initial_lr"] for group in groups]
        schedule["_last_lr"] = [group["lr"] for group in groups]
        schedule["lr_lambdas"] = [None] * len(groups)
    return meta


@naming_damaged_parts()
def read_shards(path: Path) -> dict[str, Tensor]:
    """Reads the weights in a folder that any mesh has written, by the model's own names, in one
    process.

    Raises:
        DataError: one of them is no tensor, larger than all files, or damaged.
    """
    weights = {}
    stored = sum(file.stat().st_size for file in path.iterdir())
    for name, entry in SafeReader(path).read_metadata().state_dict_metadata.items():
        if not name.startswith(PREFIX):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise DataError(
                f"checkpoint {path}: {name.removeprefix(PREFIX)} is a {type(entry).__name__}, "
                "expected a tensor"
            )
        declared = math.prod(entry.size) * entry.properties.dtype.itemsize
        # before memory is taken for it
        if not 0 <= declared <= stored:
            raise DataError(
                f"{path / TABLE} is damaged: {name.removeprefix(PREFIX)} has {declared:,} bytes, "
                f"and the folder {stored:,}"
            )
        weights[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(weights, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


def new_gloo_group(timeout: timedelta) -> Any:
    """All ranks once more, on the CPU: what they send each other here mixes with nothing that
    training sends, and waits for no device."""
    return dist.new_group(timeout=timeout, backend="gloo")


def leave(group: Any) -> None:
    """Ends a `new_gloo_group`."""
    dist.destroy_process_group(group)


def shards_writer(
    checkpoint: dict[str, Any], folder: Path, first: bool, group: Any
) -> Callable[[], None]:
    """Returns what writes a checkpoint into `folder`; all ranks call it.

    Args:
        checkpoint: as Lightning has it.
        first: whether this rank writes what is not sharded.
        group: a `new_gloo_group`, with which the state is copied to the CPU now and written from
            now on, and what is returned waits for that; or None.
    """
    state = {"state_dict": checkpoint["state_dict"]}
    for index, moments in enumerate(checkpoint["optimizer_states"]):
        state[f"optimizer_{index}"] = moments
    meta = without_keys(checkpoint, ("state_dict", "optimizer_states"))
    if group is None:
        write: Callable[[], Any] = partial(dcp.save, state, checkpoint_id=folder)
    else:
        # Training goes on changing it while it is written.
        meta = copy_to_cpu(meta)
        pending = dcp.async_save(state, checkpoint_id=folder, process_group=group)
        write = pending.result if isinstance(pending, Future) else pending.upload_completion.result

    def write_all() -> None:
        write()
        if first:
            check_all_there(folder)
            write_file(meta, folder / META)

    return write_all


def check_all_there(folder: Path) -> None:
    """Raises DataError where a rank has written its part of a checkpoint elsewhere, as onto another
    machine's own disk."""
    table = SafeReader(folder).read_metadata()
    names = {info.relative_path for info in table.storage_data.values()}
    # A network's file system may show a new file some seconds late.
    for _ in range(10):
        missing = sorted(name for name in names if not (folder / name).is_file())
        if not missing:
            return
        time.sleep(1)
    raise DataError(
        f"{folder} lacks {missing[0]}, which another machine has written to a disk of its own; "
        "name a folder for runs= that all machines share"
    )


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes one file. Lightning would pass it through memory, and torch, which is given an open
    file here, would hide the system's error behind its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_checkpoint(path)  # what a killed process left
    with path.open("wb") as file:
        torch.save(checkpoint, file)


def write_atomically(path: Path, write: Callable[[], None], commits: bool) -> None:
    """Calls `write`, which writes to `partial_path(path)`, and puts that in its place.

    Args:
        commits: whether this rank does the latter, after all have written.

    Raises:
        DataError: the system could not write it. What was there before is intact.
    """
    try:
        with naming_checkpoint(path):
            write()
            if commits:
                commit_checkpoint(path)
    except BaseException:
        if commits:
            with suppress(OSError):
                remove_checkpoint(partial_path(path))
        raise


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Raises DataError that names the checkpoint where the system could not write it."""
    try:
        yield
    except Exception as error:
        reason = system_error(error)
        if reason is None:
            raise
        raise DataError(
            f"{path} could not be written: {reason}; the checkpoints before it are intact, so make "
            "room and go on with resume="
        ) from error


def system_error(error: BaseException) -> str | None:
    """Returns what the system said, which torch hides behind errors of its own; None where the
    system said nothing."""
    failures = [error]
    if isinstance(error, dcp.api.CheckpointException):  # errors of several ranks
        failures = [failure[0] for failure in error.failures.values()]
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OSError):
                return os.strerror(cause.errno) if cause.errno else str(cause)
            cause = cause.__cause__ or cause.__context__
    return None


BACKGROUND = {"background": True}
"""The `storage_options` of a checkpoint that is written while training goes on."""


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints to a temporary sibling, which takes its name when it is on the disk.

    A checkpoint is complete when `save_checkpoint` returns, except with the `storage_options`
    `BACKGROUND`: it is then copied to the CPU and written by a thread, at most one at a time.
    Lightning's AsyncCheckpointIO copies on the GPU, tensors that share memory several times, lets
    any number of copies wait, and tells an error only after the next one has begun.
    """

    def __init__(self) -> None:
        self.executor: ThreadPoolExecutor | None = None
        self.pending: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a file. Raises DataError where it, or the one before, could not be written."""
        # raises the error of the write before, whose copy is free after it
        self.wait()
        path = Path(path)
        if storage_options:
            checkpoint = copy_to_cpu(checkpoint)
        write = partial(write_file, checkpoint, partial_path(path))
        self.write(path, write, background=bool(storage_options))

    def write(
        self, path: Path, write: Callable[[], None], background: bool, commits: bool = True
    ) -> None:
        """See `write_atomically`; in the background it returns at once."""
        if not background:
            write_atomically(path, write, commits)
            return
        if self.executor is None:
            self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending = self.executor.submit(write_atomically, path, write, commits)

    def wait(self) -> None:
        """Waits for the pending write, and raises its error."""
        if self.pending is not None:
            wait([self.pending])
            # forgotten before its error is raised, so that it is raised once
            pending, self.pending = self.pending, None
            pending.result()

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint, after the pending write and only if that succeeds: until then this
        may be the newest."""
        if self.pending is None or self.executor is None:
            remove_checkpoint(Path(path))
        else:
            self.pending = self.executor.submit(remove_after, self.pending, Path(path))

    def teardown(self) -> None:
        """Waits for the pending write. A run that ended well has waited before, so an error here
        comes on top of another and is only logged."""
        if self.pending is not None:
            if error := self.pending.exception():
                log.error("%s", error)
            self.pending = None
        if self.executor is not None:
            self.executor.shutdown()
            self.executor = None


def remove_after(written: Future[None], path: Path) -> None:
    """Deletes a checkpoint, or raises the error of the one that was to replace it."""
    written.result()
    remove_checkpoint(path)


def copy_to_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that training does not change; tensors that share memory still do."""
    # without pinned or shared memory and async copies: it is complete when `stage` returns
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copy: Any = stager.stage(checkpoint)
    stager.close()
    return copy


def gather_objects(group: Any, value: Any) -> list[Any]:
    """Returns a small object of each rank of a process group, in their order; None is one
    process."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def world_group(strategy: Strategy) -> Any:
    """Returns the process group of a strategy's ranks, None for one process."""
    is_parallel = isinstance(strategy, ParallelStrategy) and dist.is_initialized()
    return dist.group.WORLD if is_parallel else None


def gather_from_ranks(strategy: Strategy, value: Any) -> list[Any]:
    """Returns a small object of each rank, in their order."""
    return gather_objects(world_group(strategy), value)


def raised_on_every_rank(strategy: Strategy) -> AbstractContextManager[None]:
    """Raises an error of the block on every rank of a strategy (see `raised_together`)."""
    return raised_together(world_group(strategy))


@contextmanager
def raised_together(group: Any) -> Iterator[None]:
    """Raises an error of the block on every rank, so that none waits for one that has failed.

    Args:
        group: of the ranks, all of which enter the block; None is one process.

    Raises:
        DataError: on the ranks that have not failed themselves.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:  # is raised again below, when the others know of it
        failure = error
    reason = None
    if failure is not None:
        # a DataError says by itself what is wrong; of others the class is half of it
        kind = "" if isinstance(failure, DataError) else f"{type(failure).__name__}: "
        reason = f"{kind}{str(failure)[:300]}"
    reasons = gather_objects(group, reason)
    if failure is not None:
        raise failure
    for rank, text in enumerate(reasons):
        if text is not None:
            raise DataError(f"rank {rank} has failed: {text}")
