"""How a model is shared out over the ranks of a mesh. The parts say their sharding units and which
projections tensor parallelism splits; here torch does it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule, Trainer
from peft.tuners.lora import LoraLayer
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as SplitAlong
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from owlfuse.core.types import without_keys
from owlfuse.model.adapters import PARTS
from owlfuse.model.layouts import names_in_float32
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.vision.batch_norm import trained_norms
from owlfuse.parallel.collectives import data_group, data_ranks
from owlfuse.parallel.strategies import Sharded


def shard(model: MultimodalLM, mesh: DeviceMesh, precision: str) -> None:
    """Splits the projections over the mesh's `tensor_parallel` ranks, and all parameters over its
    `data_parallel` ranks, in place. The model may have no memory yet.

    Args:
        precision: Lightning's. With `bf16-mixed` GPUs gather parameters in bfloat16, and add
            gradients up in float32.

    Raises:
        ValueError: heads that the tensor ranks do not divide.
    """
    tensor, data = mesh["tensor_parallel"], mesh["data_parallel"]
    if tensor.size() > 1:
        split_projections(model, tensor)
    if data.size() > 1 or tensor.size() == 1:
        policy = MixedPrecisionPolicy()
        # whose norms take no weights of another type; what chooses experts has to stay in 32 bits
        lowers = precision == "bf16-mixed" and not names_in_float32(model.llm)
        if lowers and mesh.device_type != "cpu":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        # units first: the call for the model takes what is in none of them
        for unit in model.sharding_units():
            fully_shard(unit, mesh=data, mp_policy=policy)
        fully_shard(model, mesh=data, mp_policy=policy)
        # It is called beside `forward`, and FSDP gathers parameters for hooked methods alone.
        register_fsdp_forward_method(model, "encode")


def evaluation_precision(trainer: Trainer) -> AbstractContextManager:
    """Under which a trained model is evaluated: where it is shared out, weights are gathered in the
    training's lower precision, so what they meet has to be in it too; elsewhere weights are
    float32, and nothing is lowered."""
    return (
        trainer.precision_plugin.forward_context()
        if isinstance(trainer.strategy, Sharded)
        else nullcontext()
    )


def split_projections(model: MultimodalLM, mesh: DeviceMesh) -> None:
    """Tensor parallelism: heads and hidden units are shared out, what comes out of a block is
    added up."""
    model.check_split(mesh.size())
    for projection, role in model.projections():
        if role == "rows":
            style: Any = RowwiseParallel()
        elif role == "columns":
            style = ColwiseParallel()
        else:
            # what comes in is split already, and needed whole
            style = ColwiseParallel(input_layouts=SplitAlong(-1))
        if not isinstance(projection, LoraLayer):
            parallelize_module(projection, mesh, style)
            continue
        parallelize_module(projection.base_layer, mesh, style)
        for down, up in zip(projection.lora_A.values(), projection.lora_B.values(), strict=True):
            # The product of the two is split on the side that its projection is split on.
            half = down if role == "rows" else up
            parallelize_module(half, mesh, style)
    for module in model.modules():
        if hasattr(module, "share"):
            # numbers, no tensor
            module.share = (mesh.get_local_rank(), mesh.size())  # type: ignore[assignment]


def restore_ties(model: nn.Module, tied: dict[str, nn.Parameter]) -> None:
    """Parameters that were one under several names are one again: `to_empty` makes one for each
    name.

    Args:
        tied: the parameters by each of their names, before.
    """
    first: dict[int, str] = {}
    for name, tensor in tied.items():
        same = first.setdefault(id(tensor), name)
        if same != name:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(same))


def zero_other_rows(table: nn.Parameter, rows: list[int]) -> None:
    """Sets the gradient of a table (V, D) to zero but for some rows, each rank in its own part."""
    gradient = table.grad
    if gradient is None:
        return
    mask = torch.zeros(table.shape[0], 1, device=gradient.device)
    mask[rows] = 1
    if isinstance(gradient, DTensor):
        # Every rank has made the same mask, so that nothing is sent.
        mask = distribute_tensor(
            mask, gradient.device_mesh, gradient.placements, src_data_rank=None
        )
    gradient.mul_(mask)


def build_for(
    module: LightningModule, build: Callable[[], tuple[MultimodalLM, Any]]
) -> tuple[MultimodalLM, Any]:
    """What `build` gives, a model and its summary, the model as the module's strategy needs it.

    Where the model is sharded, rank 0 builds or loads it on the CPU. Every rank builds it on the
    meta device, shards that, and receives its own parts of rank 0's weights.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, Sharded):
        model, summary = build()
        synchronize_norms(model, module.trainer)
        return model, summary
    source = build()[0] if strategy.is_global_zero else None
    generator = torch.get_rng_state()
    with torch.device("meta"):
        model, summary = build()
    synchronize_norms(model, module.trainer)
    match_loaded(model, source, strategy)
    shard(model, strategy.device_mesh, module.trainer.precision)
    receive_weights(model, source, strategy)
    del source
    # some modules refer to one another, and would keep the copy of all weights for long
    gc.collect()
    # dropout is that of a rank that has drawn the weights itself
    torch.set_rng_state(strategy.broadcast(generator))
    return model, summary


def match_loaded(model: MultimodalLM, source: MultimodalLM | None, strategy: Sharded) -> None:
    """Gives a model on the meta device what transformers reads with the weights alone: the types of
    parameters, of which some stay float32, and the tokens at which generation ends."""
    loaded: Any = None
    if source is not None:
        loaded = (
            {name: parameter.dtype for name, parameter in source.named_parameters()},
            source.llm.generation_config,
        )
    types, model.llm.generation_config = strategy.broadcast(loaded)
    for name, parameter in model.named_parameters():
        # without memory, so that nothing is copied
        parameter.data = parameter.data.to(types[name])


def receive_weights(model: MultimodalLM, source: MultimodalLM | None, strategy: Sharded) -> None:
    """Gives a sharded model on the meta device memory, and each rank's parts of what rank 0 has.

    Args:
        source: rank 0's model on the CPU, None on other ranks.
    """
    tied = dict(model.named_parameters(remove_duplicate=False))
    model.to_empty(device=strategy.root_device)
    restore_ties(model, tied)
    state = source.state_dict() if source is not None else {}
    # A state dict lacks what is computed when a model is built, as rotary frequencies are.
    computed = dict(source.named_buffers(remove_duplicate=False)) if source is not None else {}
    computed = strategy.broadcast(without_keys(computed, state))
    for name, buffer in computed.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(strategy.root_device))
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )


def check_norms(model: MultimodalLM, trainer: Trainer) -> None:
    """Raises ValueError for batch norms that are trained by several processes without GPUs."""
    if trainer.strategy.root_device.type != "cpu" or data_ranks(trainer) == 1:
        return
    # a connector or a fusion of the user's own may have some, too
    for part in PARTS:
        if trained_norms(getattr(model, part)):
            raise ValueError(
                f"model.{part}: batch norms are trained, and torch adds up the statistics of "
                "several processes on GPUs alone; take one process, a part without them (such as "
                f"model/vision=convnet_group_norm), or model/adapter@model.adapter.{part}=frozen"
            )


def synchronize_norms(model: MultimodalLM, trainer: Trainer) -> None:
    """Batch norms that are trained take the statistics of all ranks' pictures, as one process
    would (torch's SyncBatchNorm)."""
    group = data_group(trainer)
    if group is not None and trained_norms(model):
        convert_sync_batchnorm(model, group)
