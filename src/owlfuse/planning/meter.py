"""What a forward and backward pass needs, read off meta tensors (or real ones): bytes alive at each
moment, bytes kept for the backward pass, and FLOPs.

B rows, T text positions, H heads, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

# The CPU's flash attention is the kernel that meta tensors have; its sizes are those of a GPU's.
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch has formulas for the GPU's kernels alone, which begin with the same arguments.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    ATTENTION: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
    ATTENTION_BACKWARD: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_backward],
}
LOWER_PRECISION: set[Any] = {
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
    Tensor.addmm,
    Tensor.baddbmm,
}
"""What autocast runs in the lower precision on a GPU, and what it runs in float32, of what these
models call."""
FLOAT32: set[Any] = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
    torch.softmax,
    Tensor.softmax,
    torch.sum,
}


@dataclass
class StepCost:
    """What one forward and backward pass needed, parameters and buffers apart.

    Bytes and floating-point operations.
    """

    saved: int = 0
    """Bytes of the distinct storages that autograd keeps from the forward for the backward pass.
    With checkpointing: the inputs of what is computed again, and what is outside of it."""
    forward: int = 0
    """FLOPs, two for a multiplication with its addition, of matrix products, convolutions and
    attention (in full, as if it were not causal)."""
    backward: int = 0
    """FLOPs, with those of a forward that is computed again."""
    moments: list[tuple[int, int]] = field(default_factory=list)
    """After each operation: bytes alive that are no gradients of parameters, and bytes of
    gradients of parameters."""

    @property
    def activations(self) -> int:
        """The most bytes alive at once, gradients of parameters apart."""
        return max((alive for alive, _ in self.moments), default=0)

    def peak(self, earlier_gradients: int | None = None, share: float = 1.0) -> float:
        """Return the most bytes alive at once, gradients of parameters among them.

        Args:
            earlier_gradients: bytes of gradients of an earlier micro batch, which exist from the
                beginning.
            share: the part of each gradient that this rank keeps, where gradients are sharded.
        """
        if earlier_gradients is not None:
            return self.activations + earlier_gradients * share
        return max((alive + gradients * share for alive, gradients in self.moments), default=0)


def measure_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    inputs: Iterable[Tensor] = (),
    autocast: torch.dtype | None = None,
) -> StepCost:
    """Runs `loss` and its backward pass and returns what they need. Gradients stay in the model's
    parameters.

    Args:
        inputs: what `loss` reads that is on the device too, the batch.
        autocast: the lower precision of a mixed one, as a GPU's autocast would cast; for meta
            tensors, which it leaves alone.
    """
    cost = StepCost()
    fixed = [*model.parameters(), *model.buffers()]
    meter = Meter(cost, fixed)
    # The batch is alive for the whole step.
    for tensor in inputs:
        meter.add(tensor)
    hooks = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(meter.count_gradient)
            hooks.append(hook)
    try:
        with OnMeta(autocast) as kernels, meter:
            with count_saved(cost, fixed):
                value = loss()
            kernels.copies = None  # autocast forgets its copies where its region ends
            cost.forward = meter.flops
            run_backward(value)
            cost.backward = meter.flops - cost.forward
    # The model is measured again, with other batches.
    finally:
        for hook in hooks:
            hook.remove()
    return cost


def run_backward(value: Tensor) -> None:
    """Runs `value.backward()` with the function modes on, which a forward that is computed again
    needs.

    Tensor.backward and torch.autograd.backward are torch functions themselves, and a mode is off
    inside of what it handles: hence the private function.
    """
    keep_graph = create_graph = False
    _engine_run_backward(
        (value,),
        (torch.ones_like(value),),
        keep_graph,
        create_graph,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


@contextmanager
def count_saved(cost: StepCost, fixed: Iterable[Tensor]) -> Iterator[None]:
    """Counts the distinct storages that autograd saves inside, those of `fixed` apart."""
    counted = {storage_key(tensor) for tensor in fixed}
    storages = []  # held, so that no other storage gets a key that is counted

    def pack(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key not in counted:
            counted.add(key)
            storages.append(tensor.untyped_storage())
            cost.saved += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    storages.clear()  # autograd keeps `pack`, and with it the list


def storage_key(tensor: Tensor) -> int:
    """Return which storage a tensor has, also of meta tensors, whose data have no address: hence
    the private attribute."""
    return tensor.untyped_storage()._cdata


class Meter(TorchDispatchMode):
    """Records what is alive after every operation, and counts FLOPs by the formulas of torch's
    FlopCounterMode."""

    def __init__(self, cost: StepCost, fixed: Iterable[Tensor]) -> None:
        super().__init__()
        self.cost = cost
        # Parameters and buffers are counted by the plan.
        self.fixed = {storage_key(tensor) for tensor in fixed}
        self.alive: dict[int, tuple[weakref.ref, int]] = {}
        self.bytes = 0
        self.gradients: set[int] = set()
        self.gradient_bytes = 0
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # what a mask holds is not known: no shortcut for rows without padding is taken
            return 0
        out = func(*args, **kwargs)
        # Views and results in place share a storage that is counted already.
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        operation = func._overloadpacket  # what torch's own FlopCounterMode looks up
        formula = FORMULAS.get(operation)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        self.cost.moments.append((self.bytes - self.gradient_bytes, self.gradient_bytes))
        return out

    def add(self, tensor: Tensor) -> None:
        """Counts the tensor's storage from now until it is freed."""
        key, storage = storage_key(tensor), tensor.untyped_storage()
        if key in self.fixed or key in self.alive:
            return
        # Called when the last tensor of the storage is gone, as the allocator would free it.
        reference = weakref.ref(storage, partial(self.remove, key))
        self.alive[key] = reference, storage.nbytes()
        self.bytes += storage.nbytes()

    def remove(self, key: int, reference: Any) -> None:
        """Counts a storage no longer, which is freed. Called by its weak reference."""
        size = self.alive.pop(key)[1]
        self.bytes -= size
        if key in self.gradients:
            self.gradients.remove(key)
            self.gradient_bytes -= size

    def count_gradient(self, parameter: Tensor) -> None:
        """Counts a complete gradient as such, and no longer as an activation."""
        assert parameter.grad is not None
        # A gradient that is accumulated in place is counted once.
        key = storage_key(parameter.grad)
        if key in self.alive and key not in self.gradients:
            self.gradients.add(key)
            self.gradient_bytes += self.alive[key][1]


class OnMeta(TorchFunctionMode):
    """What a GPU does and meta tensors do not by themselves: fused attention, which keeps no
    scores, and autocast."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.copies: dict[int, Tensor] | None = {}
        """Of trained parameters in the lower precision, each made once in a forward."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Real tensors meet real kernels and a real autocast.
        values = (*args, *kwargs.values())
        if not any(isinstance(value, Tensor) and value.is_meta for value in values):
            return func(*args, **kwargs)
        attends = func is F.scaled_dot_product_attention
        if self.autocast is not None and (attends or func in LOWER_PRECISION):
            args, kwargs = tree_map(self.lower, (args, kwargs))
        elif self.autocast is not None and func in FLOAT32:
            args, kwargs = tree_map(as_float32, (args, kwargs))
        return attend(*args, **kwargs) if attends else func(*args, **kwargs)

    def lower(self, value: Any) -> Any:
        """Return a float tensor in the lower precision, and anything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dtype == self.autocast:
            return value
        is_trained = value.is_leaf and value.requires_grad
        # Autocast caches the copies of trained leaves alone.
        if self.copies is None or not is_trained:
            return value.to(self.autocast)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.autocast)
        return self.copies[id(value)]


def as_float32(value: Any) -> Any:
    """Return a tensor of a 16-bit float in 32 bits, and anything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return `F.scaled_dot_product_attention` by the fused kernel, query (B, H, T, d).

    A bool mask becomes a float one for it.
    """
    # The kernel takes no bool mask.
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # Zeros, since only the type and the shape matter to tensors without values.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    # 0.0: the CPU's kernel knows no dropout.
    return ATTENTION(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
