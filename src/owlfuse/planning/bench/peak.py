"""`owlfuse bench peak`: the share of the machine's measured matrix rate that a training step
reaches, against the floor in operations and bytes, and where the rest of its time goes.

The step is that of `owlfuse bench step`, packed and with logits where they are supervised. The
matrix rate and the memory's are taken in turns with the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from owlfuse.model.loss import batch_loss
from owlfuse.planning.bench.pairs import device_name, in_turns, lowered, seconds_of
from owlfuse.planning.bench.report import leave
from owlfuse.planning.bench.step import SIZES, STAGES, batch_of, our_model, samples_of, step_of
from owlfuse.planning.meter import read

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_convolution"),
    "attention": (
        "scaled_dot_product",
        "efficient_attention",
        "flash_attention",
        "cudnn_attention",
    ),
    "loss": ("log_softmax", "nll_loss"),
    "optimizer": ("_fused_adam",),
    "clipping": ("_foreach", "linalg_vector_norm"),
    "gathering and scattering": ("index", "embedding", "gather"),
    "copies, fills and joins": ("copy_", "cat", "fill_", "zero_", "clone", "empty"),
}
"""How the names of torch's operations begin, by kind.

All others are norms, activations, rotations and sums.
"""
REST = "norms, activations, rotations, sums"
BETWEEN = "between operations: Python, autograd, dispatch"
TERMS = {
    "parameters, read forward and backward": 2,
    "gradients, written": 1,
    "gradients, divided and clipped": 5,
    "AdamW: parameter, gradient and two moments read, three written": 7,
}
"""How many times a step moves as many bytes as the parameters have, whatever its samples."""


def kind_of(operation: str) -> str:
    """The kind of one of torch's operations."""
    name = operation.removeprefix("aten::").removeprefix("_")
    for kind, begins in KINDS.items():
        if any(name.startswith(begin.removeprefix("_")) for begin in begins):
            return kind
    return REST


def profile_of(step: Callable[[], Any], turns: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step by kind of operation, and by stage."""
    device = device_name()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        wall = seconds_of(lambda: [step() for _ in range(turns)], device) / turns
    kinds: Any = Counter()  # of seconds
    stages = dict.fromkeys(STAGES, 0.0)
    for event in found.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if event.key in stages:
            stages[event.key] += event.cpu_time_total / 1e6 / turns
        elif event.key.startswith("aten::"):
            kinds[kind_of(event.key)] += own / 1e6 / turns
    kinds[BETWEEN] = max(wall - sum(kinds.values()), 0.0)
    return dict(kinds.most_common()), stages


def floor_of(parameters: int, kept: int) -> dict[str, int]:
    """Bytes that a step moves at least: of what is as large as the parameters, and of what the
    forward keeps."""
    return {
        **{name: times * parameters for name, times in TERMS.items()},
        "kept for the backward, written and read": 2 * kept,
    }


def bench_peak(
    out: Path, repeats: int = 7, pack_to: int = 320, precision: str = "32-true", size: str = "small"
) -> dict[str, Any]:
    """Prints the tables, and writes peak.md and peak.json into `out`.

    Arguments are `bench_step`'s.
    """
    sizes, data = SIZES[size]
    device, quick = device_name(), size == "quick"
    batch = batch_of(samples_of(data, sizes, sizes.visual_tokens), sizes, pack_to)
    model = our_model(sizes)
    inputs = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    with lowered(precision):
        reading = read(model, lambda: batch_loss(model, batch)[0], inputs)
    model.zero_grad()
    step = partial(step_of(model, precision), lambda: batch_loss(model, batch))
    runs, flops, copied = yardsticks(
        device, torch.bfloat16 if precision == "bf16-mixed" else torch.float32, quick
    )
    seconds = in_turns({"step": step, **runs}, repeats, warm_up=2)
    middle = {name: sorted(turns)[len(turns) // 2] for name, turns in seconds.items()}
    operations = reading.forward + reading.backward
    rate, bandwidth = flops / middle["products"], copied / middle["copies"]
    shares = sorted(
        operations / own / (flops / other)
        for own, other in zip(seconds["step"], seconds["products"], strict=True)
    )
    moved = floor_of(sum(p.numel() * p.element_size() for p in model.parameters()), reading.kept)
    kinds, stages = profile_of(step, 1 if quick else 2)
    result = {
        "sizes": vars(sizes),
        "data": vars(data),
        "precision": precision,
        "seconds": seconds,
        "tokens": sum(batch.lengths),
        "operations": {"forward": reading.forward, "backward": reading.backward},
        "bytes": moved,
        "matrix_flops_per_second": rate,
        "copy_bytes_per_second": bandwidth,
        "share_of_matrix_rate": shares[len(shares) // 2],
        "share_of_floor": (operations / rate + sum(moved.values()) / bandwidth) / middle["step"],
        "profile_seconds": kinds,
        "stage_seconds": stages,
    }
    leave(out, "peak", result, tables_of(result, middle["step"]))
    return result


def yardsticks(
    device: str, dtype: torch.dtype, quick: bool
) -> tuple[dict[str, Callable[[], Any]], int, int]:
    """What the machine is measured by, matrix products and copies; the operations of the one, and
    the bytes of the other, read and written."""
    size = 8192 if device == "cuda" else 256 if quick else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(2**20 if quick else 2**26, device=device) for _ in range(2))
    products, copies = max(1, int(2e10 / 2 / size**3)), 4
    runs = {
        "products": lambda: [a @ b for _ in range(products)],
        "copies": lambda: [target.copy_(source) for _ in range(copies)],
    }
    return runs, products * 2 * size**3, copies * 8 * source.numel()


def tables_of(result: dict[str, Any], step: float) -> list[tuple[str, list[str], list[list[str]]]]:
    """The floor, and the profile."""
    rate, bandwidth = result["matrix_flops_per_second"], result["copy_bytes_per_second"]
    operations, moved = sum(result["operations"].values()), sum(result["bytes"].values())
    floor = [
        [f"operations, {k}", f"{n / 1e9:.1f} GFLOP", f"{1000 * n / rate:.1f}"]
        for k, n in result["operations"].items()
    ]
    floor += [
        [name, f"{n / 1e9:.3f} GB", f"{1000 * n / bandwidth:.1f}"]
        for name, n in result["bytes"].items()
    ]
    floor += [
        [
            "operations and bytes, one after the other",
            "",
            f"{1000 * (operations / rate + moved / bandwidth):.1f}",
        ],
        ["the step, measured", "", f"{1000 * step:.1f}"],
    ]
    reached = (
        f"the floor of a step: the machine multiplies matrices at {rate / 1e9:.0f} GFLOP/s and "
        f"copies {bandwidth / 1e9:.1f} "
        f"GB/s; the step reaches {result['share_of_matrix_rate']:.0%} of the matrix rate, and the "
        "floor is "
        f"{result['share_of_floor']:.0%} of it"
    )
    tables = [(reached, ["", "amount", "ms at that rate"], floor)]
    for title, parts in (
        ("by kind of operation", result["profile_seconds"]),
        ("by stage", result["stage_seconds"]),
    ):
        whole = sum(parts.values()) or 1.0
        rows = [
            [name, f"{1000 * value:.1f}", f"{value / whole:.1%}"] for name, value in parts.items()
        ]
        tables.append(
            (f"where the step's time goes, {title} (torch's profiler)", ["", "ms", "share"], rows)
        )
    return tables
