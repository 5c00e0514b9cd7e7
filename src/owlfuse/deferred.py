"""Models built without their weights, which are made later, one tensor at a time: so a rank never holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

SEEDED = torch.Tag.nondeterministic_seeded
OVERWRITES = ("normal_", "uniform_", "zero_", "fill_", "copy_")
"""In-place operations after which nothing is left of what a tensor held."""


@dataclass
class Step:
    """One operation on tensors without memory, or one tensor read from elsewhere."""

    run: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    reads: set[int]
    writes: set[int]
    overwrites: int | None = None
    generator: Tensor | None = None
    """The state of torch's generator before it, where it draws numbers."""
    load: Callable[[], Tensor] | None = None
    """Gives all that its tensor holds, where that is read from elsewhere."""


@dataclass
class Deferred(TorchDispatchMode):
    """Within `with Deferred() as deferred:` what torch makes on the CPU has no memory; what was done to it is written down, and
    `value` does it again for one tensor at a time, bit for bit as if the model had been built in memory.

    Random numbers are drawn when the model is built, and thrown away, so that the generator goes on from the same state.
    """

    steps: list[Step] = field(default_factory=list)
    written: dict[int, list[int]] = field(default_factory=dict)
    """The steps that write a storage."""
    scratch: torch.UntypedStorage = field(default_factory=lambda: torch.UntypedStorage(0))
    """Where random numbers are drawn, to be thrown away: memory of their own would leave holes that are never given back."""
    draws: bool = True
    """False: random numbers are not drawn, for weights that are read from elsewhere."""
    current: ClassVar[Deferred | None] = None
    """The one that a model is being built in."""

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Deferred:
        Deferred.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Deferred.current = None
        self.scratch = torch.UntypedStorage(0)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if SEEDED in func.tags and not self.draws:
            shapes, options = tree_map(to_meta, (args, kwargs))
            return func(*shapes, **options)
        makes = not tensors and "device" in {argument.name for argument in func._schema.arguments}
        if makes and (args[:1] not in (([],), ([0],)) or kwargs.get("device") == torch.device("meta")):
            return self.record(func, args, {**kwargs, "device": torch.device("cpu")})
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.value(args[0]).item()
        return self.record(func, args, kwargs)

    def record(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs an operation on shapes alone, and writes it down unless it only looks at a tensor in another way."""
        shapes, options = tree_map(to_meta, (args, kwargs))
        generator = torch.get_rng_state() if SEEDED in func.tags else None
        out = func(*shapes, **options)
        if generator is not None:
            func(*tree_map(self.in_scratch, args), **tree_map(self.in_scratch, kwargs))
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.is_meta]
        changed = changed_by(func, args, kwargs)
        before = {storage_of(x) for x in given}
        made = {storage_of(x) for x in outputs} - before
        if made or changed:
            name = func._schema.name.removeprefix("aten::")
            whole = bool(changed) and name in OVERWRITES and covers(changed[0])
            self.write(
                Step(
                    func,
                    args,
                    kwargs,
                    outputs,
                    before,
                    made | {storage_of(x) for x in changed},
                    storage_of(changed[0]) if whole else None,
                    generator,
                )
            )
        return out

    def in_scratch(self, value: Any) -> Any:
        """A tensor of the same shape with memory, whatever it holds."""
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        size = value.element_size() * (1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True)))
        if self.scratch.nbytes() < size:
            self.scratch = torch.UntypedStorage(size)
        return torch.empty(0, dtype=value.dtype).set_(self.scratch, 0, value.shape, value.stride())

    @contextmanager
    def drawing_nothing(self) -> Iterator[None]:
        """Inside, random numbers are neither drawn nor written down."""
        self.draws = False
        try:
            yield
        finally:
            self.draws = True

    def read(self, tensor: Tensor, load: Callable[[], Tensor]) -> None:
        """From here on the tensor, all of its storage, holds what `load` gives: a tensor of its shape."""
        if not tensor.is_meta:
            with in_memory_after_all(), torch.no_grad():
                tensor.copy_(load())
            return
        key = storage_of(tensor)
        self.write(Step(lambda own: own.copy_(load()), (tensor,), {}, [], {key}, {key}, key, load=load))

    def write(self, step: Step) -> None:
        """Adds a step. It keeps the memory that its tensors have now: a parameter may be given other memory later."""
        with torch.utils._python_dispatch._disable_current_modes():
            step.args, step.kwargs, step.outputs = tree_map(own_name, (step.args, step.kwargs, step.outputs))
        for key in step.writes:
            self.written.setdefault(key, []).append(len(self.steps))
        self.steps.append(step)

    def value(self, tensor: Tensor) -> Tensor:
        """What the tensor would hold, in memory. A tensor that was made outside is given back as it is, and one that is read
        from elsewhere as it is read, since it may be large: not to be written into."""
        if not tensor.is_meta:
            return tensor
        state = torch.get_rng_state()
        memory: dict[int, torch.UntypedStorage] = {}
        needed = sorted(self.needed(storage_of(tensor), len(self.steps)))
        last = self.steps[needed[-1]] if needed else None
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            if last is not None and last.load is not None and same_place(last.args[0], tensor):
                return last.load().to(tensor.dtype)
            for index in needed:
                replay(self.steps[index], memory)
            result = real(tensor, memory)
        torch.set_rng_state(state)
        return result

    def needed(self, key: int, end: int) -> set[int]:
        """The steps before `end` that decide what a storage holds."""
        found: set[int] = set()
        open_: list[tuple[int, int]] = [(key, end)]
        while open_:
            key, end = open_.pop()
            for index in reversed(self.written.get(key, [])):
                if index >= end or index in found:
                    continue
                step = self.steps[index]
                found.add(index)
                open_ += [(other, index) for other in step.reads if other != key]
                if step.overwrites == key:
                    break
        return found


@contextmanager
def in_memory_after_all() -> Iterator[None]:
    """Inside, tensors have memory: for what can only be read as a whole."""
    current, Deferred.current = Deferred.current, None
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            yield
    finally:
        Deferred.current = current


def replay(step: Step, memory: dict[int, torch.UntypedStorage]) -> None:
    """Does a step in memory."""
    if step.generator is not None:
        torch.set_rng_state(step.generator)
    args, kwargs = tree_map(lambda x: real(x, memory) if isinstance(x, Tensor) else x, (step.args, step.kwargs))
    made = [x for x in tree_flatten(step.run(*args, **kwargs))[0] if isinstance(x, Tensor)]
    for shape, value in zip(step.outputs, made, strict=False):
        key = storage_of(shape)
        if key not in memory:
            if value.stride() != shape.stride() or value.storage_offset() != shape.storage_offset():
                value = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype).copy_(value)
            memory[key] = value.untyped_storage()


def real(tensor: Tensor, memory: dict[int, torch.UntypedStorage]) -> Tensor:
    """The tensor in memory: a view of its storage, which is made where no step has made it."""
    if not tensor.is_meta:
        return tensor
    key = storage_of(tensor)
    if key not in memory:
        memory[key] = torch.UntypedStorage(tensor.untyped_storage().nbytes())
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(memory[key], tensor.storage_offset(), tensor.shape, tensor.stride())


def to_meta(value: Any) -> Any:
    """A tensor's shape, and the meta device in place of the CPU."""
    if isinstance(value, Tensor):
        return value if value.is_meta or value.ndim == 0 else value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) and value.type == "cpu" else value


def own_name(value: Any) -> Any:
    """A tensor without memory under a name of its own, that no other memory is given to."""
    return value.detach() if isinstance(value, Tensor) and value.is_meta else value


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same part of one storage, seen in the same way."""
    ways = [(storage_of(x), x.storage_offset(), x.shape, x.stride()) for x in (one, other)]
    return ways[0] == ways[1]


def changed_by(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    declared = func._schema.arguments
    values = [*zip(declared, args), *((argument, kwargs[argument.name]) for argument in declared if argument.name in kwargs)]
    return [v for a, v in values if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Tensor)]


def covers(tensor: Tensor) -> bool:
    """Whether the tensor is all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def storage_of(tensor: Tensor) -> int:
    """What tells a storage from others; steps keep their tensors, so it is not given away anew."""
    return tensor.untyped_storage()._cdata
