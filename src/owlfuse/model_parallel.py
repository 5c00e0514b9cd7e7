"""How a model is shared out over the ranks of a mesh. The parts say their sharding units and which projections tensor
parallelism splits; here torch does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as SplitAlong
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.modules.batchnorm import _BatchNorm

from owlfuse.batch_norm import SyncedBatchNorm
from owlfuse.deferred import Deferred
from owlfuse.llm import check_split
from owlfuse.model import MultimodalLM
from owlfuse.parallel import Sharded, data_group, local
from owlfuse.parallel_checkpoints import SafePlanner, SafeReader
from owlfuse.types import DataError

PREFIX = "state_dict.model."
"""Before the model's own names in a checkpoint's folder."""


def shard(model: MultimodalLM, mesh: DeviceMesh, precision: str) -> None:
    """Splits the projections over the mesh's `tensor_parallel` ranks, and all parameters over its `data_parallel` ranks, in
    place. The model may have no memory yet.

    Args:
        precision: Lightning's. With `bf16-mixed` GPUs gather parameters in bfloat16, and add gradients up in float32.

    Raises:
        ValueError: heads that the tensor ranks do not divide.
    """
    tensor, data = mesh["tensor_parallel"], mesh["data_parallel"]
    if tensor.size() > 1:
        split_projections(model, tensor)
    if data.size() > 1 or tensor.size() == 1:
        policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed" and mesh.device_type != "cpu":  # whose norms take no weights of another type
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in model.sharding_units():
            fully_shard(unit, mesh=data, mp_policy=policy)
        fully_shard(model, mesh=data, mp_policy=policy)
        register_fsdp_forward_method(model, "encode")


def as_trained(trainer: Trainer) -> AbstractContextManager:
    """Under which a trained model is evaluated: where it is shared out, weights are gathered in the training's lower precision,
    so what they meet has to be in it too; elsewhere weights are float32, and nothing is lowered."""
    return trainer.precision_plugin.forward_context() if isinstance(trainer.strategy, Sharded) else nullcontext()


def split_projections(model: MultimodalLM, mesh: DeviceMesh) -> None:
    """Tensor parallelism: heads and hidden units are shared out, what comes out of a block is added up."""
    check_split(model.llm, mesh.size())
    for projection, role in model.projections():
        if role == "rows":
            style: Any = RowwiseParallel()
        elif role == "columns":
            style = ColwiseParallel()
        else:
            style = ColwiseParallel(input_layouts=SplitAlong(-1))  # what comes in is split already, and needed whole
        if not isinstance(projection, LoraLayer):
            parallelize_module(projection, mesh, style)
            continue
        parallelize_module(projection.base_layer, mesh, style)
        for down, up in zip(projection.lora_A.values(), projection.lora_B.values(), strict=True):
            parallelize_module(*((down, mesh, style) if role == "rows" else (up, mesh, style)))
    for module in model.modules():
        if hasattr(module, "share"):
            module.share = (mesh.get_local_rank(), mesh.size())  # type: ignore[assignment]  # numbers, no tensor


def fill(model: MultimodalLM, before: dict[str, Tensor], deferred: Deferred, device: torch.device) -> None:
    """Gives a model without memory its own shards of what it was built as, one tensor at a time.

    Args:
        before: the parameters and buffers by name as they were before the model was shared out.
    """
    with torch.no_grad():
        tied = named(model)
        model._apply(partial(empty, device=device))
        tie_again(model, tied)
        filled: set[int] = set()
        for name, tensor in named(model).items():
            if id(tensor) in filled or not before[name].is_meta:
                continue
            filled.add(id(tensor))
            local(tensor).copy_(part_of(deferred.value(before[name]), tensor))


def empty(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory for a tensor that has none."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def tie_again(model: nn.Module, tied: dict[str, Tensor]) -> None:
    """Parameters that were one under several names are one again: `_apply` makes one for each name."""
    first: dict[int, str] = {}
    for name, tensor in tied.items():
        same = first.setdefault(id(tensor), name)
        if same != name:
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, model.get_parameter(same))


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each under all of its names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole value, which lies as `like` does: split by the tensor ranks first, then by the data ranks."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    for dimension in reversed(range(mesh.ndim)):
        placement: Any = like.placements[dimension]
        if placement.is_replicate():
            continue
        chunks = value.chunk(mesh.size(dimension), dim=placement.dim)
        place = mesh.get_local_rank(dimension)
        value = chunks[place] if place < len(chunks) else value.narrow(placement.dim, 0, 0)
    return value


def keep_rows(table: nn.Parameter, rows: list[int]) -> None:
    """Sets the gradient of a table (V, D) to zero but for some rows, each rank in its own part."""
    if table.grad is None:
        return
    mask = torch.zeros(table.shape[0], 1, device=local(table.grad).device)
    mask[rows] = 1
    local(table.grad).mul_(part_of(mask.expand(table.shape), table.grad))


class Shards(Mapping[str, Tensor]):
    """The weights in a checkpoint's folder that a mesh has written, by the model's names: each is put together when it is
    asked for, in one process."""

    def __init__(self, path: Path) -> None:
        self.reader = ShardReader(path)
        saved = self.reader.saved.state_dict_metadata
        self.entries = {name.removeprefix(PREFIX): entry for name, entry in saved.items() if name.startswith(PREFIX)}
        for name, entry in self.entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise DataError(f"checkpoint {path}: {name} is a {type(entry).__name__}, expected a tensor")

    def __getitem__(self, name: str) -> Tensor:
        entry: Any = self.entries[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({PREFIX + name: whole}, storage_reader=self.reader, planner=SafePlanner(), no_dist=True)
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class ShardReader(SafeReader):
    """Reads the folder's table of contents once, and not with each tensor."""

    @cached_property
    def saved(self) -> dcp.Metadata:
        """What the folder holds, and where."""
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """See torch's."""
        return self.saved


def build_for(module: LightningModule, build: Callable[[], tuple[MultimodalLM, Any]]) -> tuple[MultimodalLM, Any]:
    """What `build` gives, a model and its summary, the model as the module's strategy needs it.

    Where it is sharded no rank holds more of it than its own part and one whole tensor.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, Sharded):
        model, summary = build()
        synchronize_norms(model, module.trainer)
        return model, summary
    with Deferred() as deferred:
        model, summary = build()
    synchronize_norms(model, module.trainer)
    before = named(model)
    shard(model, strategy.device_mesh, module.trainer.precision)
    fill(model, before, deferred, strategy.root_device)
    return model, summary


def synchronize_norms(model: MultimodalLM, trainer: Any) -> None:
    """Batch norms take the statistics of all ranks' rows, as one process would."""
    group = data_group(trainer)
    if group is None:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SyncedBatchNorm(child, partial(add_over, group=group)))


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over a group's ranks, and backward the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def add_over(tensor: Tensor, group: Any) -> Tensor:
    """The tensor's sum over a group's ranks, with a gradient."""
    return SumOverRanks.apply(tensor, group)
