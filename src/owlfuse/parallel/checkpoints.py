"""Checkpoints of many ranks: shards written and read by all of them, at once or in the
background."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ParallelStrategy
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

from owlfuse.core.errors import DataError

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
        *(
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
        ),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
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
    return get_optimizer_state_dict(
        model, getattr(optimizer, "_optimizer", optimizer), options=BY_NAME
    )


def load_shards(model: nn.Module, optimizers: list[Optimizer], path: Path) -> dict[str, Any]:
    """Reads each rank's own parts of a folder that any mesh has written, in place; gives what
    stands beside the shards.

    Raises:
        DataError: a trained weight of the model is not in it.
    """
    saved = SafeReader(path).read_metadata().state_dict_metadata
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
        groups = optimizers[0].param_groups  # as many as this mesh has
        schedule["base_lrs"] = [group["initial_lr"] for group in groups]
        schedule["_last_lr"] = [group["lr"] for group in groups]
        schedule["lr_lambdas"] = [None] * len(groups)
    return meta


def read_shards(path: Path) -> dict[str, Tensor]:
    """Reads the weights in a folder that any mesh has written, by the model's own names, in one
    process.

    Raises:
        DataError: one of them is no tensor.
    """
    weights = {}
    for name, entry in SafeReader(path).read_metadata().state_dict_metadata.items():
        if not name.startswith(PREFIX):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise DataError(
                f"checkpoint {path}: {name.removeprefix(PREFIX)} is a {type(entry).__name__}, "
                "expected a tensor"
            )
        weights[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(weights, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


def side_group(timeout: timedelta) -> Any:
    """All ranks once more, on the CPU: a write in the background must not mix with what training
    sends."""
    return dist.new_group(timeout=timeout, backend="gloo")


def leave(group: Any) -> None:
    """Ends a `side_group`."""
    dist.destroy_process_group(group)


def shards_writer(
    checkpoint: dict[str, Any], path: Path, first: bool, group: Any
) -> Callable[[], None]:
    """What writes a checkpoint into the folder `path`; all ranks call it. With a `group` of its own
    the state is copied to the CPU now and is written from then on, and the writer waits until it
    is.

    Args:
        checkpoint: as Lightning has it.
        first: whether this rank writes what is not sharded.
    """
    state = {"state_dict": checkpoint["state_dict"]}
    state.update(
        {
            f"optimizer_{index}": moments
            for index, moments in enumerate(checkpoint["optimizer_states"])
        }
    )
    meta = {
        key: value
        for key, value in checkpoint.items()
        if key not in ("state_dict", "optimizer_states")
    }
    if group is None:
        write: Callable[[], Any] = partial(dcp.save, state, checkpoint_id=path)
    else:
        meta = in_memory(meta)
        pending = dcp.async_save(state, checkpoint_id=path, process_group=group)
        write = pending.result if isinstance(pending, Future) else pending.upload_completion.result

    def write_all() -> None:
        write()
        if first:
            torch.save(meta, path / META)

    return write_all


def in_memory(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that training does not change; tensors that share memory still do."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copy: Any = stager.stage(checkpoint)
    stager.close()
    return copy


def every_rank(trainer: Trainer, value: Any) -> list[Any]:
    """A small object of each rank, in their order."""
    if not (isinstance(trainer.strategy, ParallelStrategy) and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def failures_of(error: BaseException) -> list[BaseException]:
    """What failed on each rank, where torch has put errors of several ranks into one."""
    if isinstance(error, dcp.api.CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]
