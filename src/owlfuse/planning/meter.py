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
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LOWER = {
    F.linear,
    *(
        getattr(torch, name)
        for name in (
            "conv1d",
            "conv2d",
            "conv3d",
            "matmul",
            "mm",
            "bmm",
            "addmm",
            "baddbmm",
            "einsum",
        )
    ),
    *(getattr(Tensor, name) for name in ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")),
}
"""What autocast runs in the lower precision on a GPU, and what it runs in float32, of what these
models call."""
FLOAT32 = {
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
class Reading:
    """What one forward and backward pass needed, parameters and buffers apart.

    Bytes and floating-point operations.
    """

    kept: int = 0
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

    def peak(self, gradients_there: int | None = None, share: float = 1.0) -> float:
        """The most bytes alive at once, gradients of parameters among them.

        Args:
            gradients_there: bytes of gradients from an earlier micro batch, which are there from
                the beginning.
            share: the part of each gradient that this rank keeps, where gradients are sharded.
        """
        if gradients_there is not None:
            return self.activations + gradients_there * share
        return max((alive + gradients * share for alive, gradients in self.moments), default=0)


def read(
    model: nn.Module,
    loss: Callable[[], Tensor],
    inputs: Iterable[Tensor] = (),
    autocast: torch.dtype | None = None,
) -> Reading:
    """Runs `loss` and its backward pass and reads off what it needs. Gradients are left in the
    model's parameters.

    Args:
        inputs: what `loss` reads that is on the device too, the batch.
        autocast: the lower precision of a mixed one, as a GPU's autocast would cast; for meta
            tensors, which it leaves alone.
    """
    reading = Reading()
    fixed = [*model.parameters(), *model.buffers()]
    meter = Meter(reading, fixed)
    for tensor in inputs:
        meter.add(tensor)
    hooks = [
        p.register_post_accumulate_grad_hook(meter.count_gradient)
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with OnMeta(autocast) as kernels, meter:
            with kept_for_backward(reading, fixed):
                value = loss()
            kernels.copies = None  # autocast forgets its copies where its region ends
            reading.forward = meter.flops
            run_backward(value)
            reading.backward = meter.flops - reading.forward
    finally:
        for hook in hooks:
            hook.remove()
    return reading


def run_backward(value: Tensor) -> None:
    """`value.backward()` with the function modes left on, which a forward that is computed again
    needs: Tensor.backward and torch.autograd.backward are torch functions themselves, and a mode is
    off inside of what it handles."""
    once = False, False  # the graph is neither kept nor differentiated again
    _engine_run_backward(
        (value,), (torch.ones_like(value),), *once, (), allow_unreachable=True, accumulate_grad=True
    )


@contextmanager
def kept_for_backward(reading: Reading, fixed: Iterable[Tensor]) -> Iterator[None]:
    """Counts the distinct storages that autograd saves inside, those of `fixed` apart."""
    seen = {key_of(tensor) for tensor in fixed}
    held = []  # so that no storage's place is taken by another while we count

    def pack(tensor: Tensor) -> Tensor:
        if key_of(tensor) not in seen:
            seen.add(key_of(tensor))
            held.append(tensor.untyped_storage())
            reading.kept += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    held.clear()  # autograd keeps `pack`, and with it the list


def key_of(tensor: Tensor) -> int:
    """Which storage a tensor has; of meta tensors too, whose data have no address."""
    return tensor.untyped_storage()._cdata


class Meter(TorchDispatchMode):
    """Notes what is alive after every operation, and counts FLOPs by the formulas of torch's
    FlopCounterMode."""

    def __init__(self, reading: Reading, fixed: Iterable[Tensor]) -> None:
        super().__init__()
        self.reading = reading
        self.fixed = {key_of(tensor) for tensor in fixed}
        self.alive: dict[int, tuple[weakref.ref, int]] = {}
        self.bytes = 0
        self.gradients: set[int] = set()
        self.gradient_bytes = 0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # what a mask holds is not known: no shortcut for rows without padding is taken
            return 0
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        count: Any = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        self.reading.moments.append((self.bytes - self.gradient_bytes, self.gradient_bytes))
        return out

    def add(self, tensor: Tensor) -> None:
        """Counts the tensor's storage from now until it is freed."""
        key, storage = key_of(tensor), tensor.untyped_storage()
        if key in self.fixed or key in self.alive:
            return
        self.alive[key] = weakref.ref(storage, partial(self.forget, key)), storage.nbytes()
        self.bytes += storage.nbytes()

    def forget(self, key: int, _: Any) -> None:
        """`remove`, as a weak reference calls it."""
        self.remove(key)

    def remove(self, key: int) -> None:
        """A storage is freed."""
        size = self.alive.pop(key)[1]
        self.bytes -= size
        if key in self.gradients:
            self.gradients.remove(key)
            self.gradient_bytes -= size

    def count_gradient(self, parameter: Tensor) -> None:
        """The parameter's gradient is complete: it is no activation."""
        assert parameter.grad is not None
        key = key_of(parameter.grad)
        if key in self.alive and key not in self.gradients:
            self.gradients.add(key)
            self.gradient_bytes += self.alive[key][1]


def attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """Of fused attention."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Of its backward pass, with the scores that it computes again."""
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS = {ATTENTION: attention_flops, ATTENTION_BACKWARD: attention_backward_flops}


class OnMeta(TorchFunctionMode):
    """What a GPU does and meta tensors do not by themselves: fused attention, which keeps no
    scores, and autocast."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.copies: dict[int, Tensor] | None = {}
        """Of trained parameters in the lower precision, each made once in a forward."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(x, Tensor) and x.is_meta for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        attends = func is F.scaled_dot_product_attention
        if self.autocast is not None and (attends or func in LOWER):
            args, kwargs = tree_map(self.lower, (args, kwargs))
        elif self.autocast is not None and func in FLOAT32:
            args, kwargs = tree_map(lambda x: x.float() if is_half(x) else x, (args, kwargs))
        return attend(*args, **kwargs) if attends else func(*args, **kwargs)

    def lower(self, value: Any) -> Any:
        """A float tensor in the lower precision; anything else as it is."""
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.dtype == self.autocast
        ):
            return value
        if self.copies is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.autocast)
        return self.copies[id(value)]


def is_half(value: Any) -> bool:
    """Whether it is a tensor in a 16-bit float."""
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


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
    """`F.scaled_dot_product_attention` by the fused kernel, query (B, H, T, d).

    A bool mask becomes a float one for it.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return ATTENTION(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
