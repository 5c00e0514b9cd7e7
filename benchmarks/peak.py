"""Benchmark `peak`: the share of the machine's measured matrix rate that a training step
reaches, against the floor in operations and bytes, and where the rest of its time goes.

The step is that of the benchmark `step`, packed and with logits where they are supervised. The
matrix rate and the memory's are taken in turns with the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import (
    autocast,
    device_name,
    seconds_of,
    time_interleaved,
    upper_median,
    write_report,
)
from benchmarks.step import (
    SIZES,
    STAGES,
    make_batch,
    make_samples,
    make_step,
    owlfuse_model,
)
from owlfuse.model.loss import batch_loss
from owlfuse.planning.meter import measure_step
from owlfuse.planning.step import bytes_of

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_convolution"),
    "attention": (
        "scaled_dot_product",
        "efficient_attention",
        "flash_attention",
        "cudnn_attention",
    ),
    "loss": ("log_softmax", "nll_loss"),
    "optimizer": ("fused_adam",),
    "clipping": ("foreach", "linalg_vector_norm"),
    "gathering and scattering": ("index", "embedding", "gather"),
    "copies, fills and joins": ("copy_", "cat", "fill_", "zero_", "clone", "empty"),
}
"""How the names of torch's operations begin, by kind, without a leading underscore."""
REMAINDER = "norms, activations, rotations, sums"
"""The kind of all other operations."""
BETWEEN = "between operations: Python, autograd, dispatch"
PARAMETER_PASSES = {
    "parameters, read forward and backward": 2,
    "gradients, written": 1,
    "gradients, divided and clipped": 5,
    "AdamW: parameter, gradient and two moments read, three written": 7,
}
"""How many times a step moves as many bytes as the parameters have, whatever its samples."""


@dataclass
class Yardsticks:
    """What the machine is measured by: matrix products, and copies in memory."""

    runs: dict[str, Callable[[], Any]]
    flops: int
    """Operations of the products."""
    copied_bytes: int
    """Bytes of the copies, read and written."""


def operation_kind(operation: str) -> str:
    """Return the kind of one of torch's operations."""
    name = operation.removeprefix("aten::").removeprefix("_")
    for kind, prefixes in KINDS.items():
        if name.startswith(prefixes):
            return kind
    return REMAINDER


def profile_step(step: Callable[[], Any], turns: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of a step by kind of operation, and by stage."""
    device = device_name()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        wall = seconds_of(lambda: [step() for _ in range(turns)], device) / turns
    kinds: Any = Counter()  # of seconds
    stages = dict.fromkeys(STAGES, 0.0)
    scale = 1e-6 / turns  # the profiler's microseconds
    for event in profiler.key_averages():
        if event.key in stages:
            stages[event.key] += event.cpu_time_total * scale
        elif event.key.startswith("aten::"):
            on_gpu = device == "cuda"
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kinds[operation_kind(event.key)] += time * scale
    # Operations nest: their own times do not overlap, and the rest is no operation's.
    kinds[BETWEEN] = max(wall - sum(kinds.values()), 0.0)
    return dict(kinds.most_common()), stages


def floor_bytes(parameter_bytes: int, saved_bytes: int) -> dict[str, int]:
    """Return the bytes that a step moves at least: of what is as large as the parameters, and of
    what the forward saves."""
    # Once written in the forward, once read in the backward pass.
    moved = {name: passes * parameter_bytes for name, passes in PARAMETER_PASSES.items()}
    moved["kept for the backward, written and read"] = 2 * saved_bytes
    return moved


def bench_peak(
    out: Path,
    repeats: int = 7,
    pack_to: int = 320,
    precision: str = "32-true",
    size: str = "small",
) -> dict[str, Any]:
    """Prints the tables, and writes peak.md and peak.json into `out`.

    Arguments are `bench_step`'s.
    """
    sizes, data = SIZES[size]
    quick = size == "quick"
    batch = make_batch(make_samples(data, sizes, sizes.visual_tokens), sizes, pack_to)
    model = owlfuse_model(sizes)
    inputs = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    # On real tensors, so that autocast casts as it does in the step.
    with autocast(precision):
        cost = measure_step(model, lambda: batch_loss(model, batch)[0], inputs)
    model.zero_grad()

    step = partial(make_step(model, precision), lambda: batch_loss(model, batch))
    yardsticks = make_yardsticks(precision, quick)
    # In turns, since a processor's clock depends on its temperature.
    seconds = time_interleaved({"step": step, **yardsticks.runs}, repeats, warm_up=2)
    medians = {name: upper_median(turns) for name, turns in seconds.items()}
    operations = cost.forward + cost.backward
    matrix_rate = yardsticks.flops / medians["products"]
    bandwidth = yardsticks.copied_bytes / medians["copies"]
    shares = []
    # By turn: a slow minute falls on the step and on its yardstick.
    for step_seconds, product_seconds in zip(seconds["step"], seconds["products"], strict=True):
        shares.append(operations / step_seconds / (yardsticks.flops / product_seconds))
    moved = floor_bytes(bytes_of(model.parameters()), cost.saved)
    floor_seconds = operations / matrix_rate + sum(moved.values()) / bandwidth
    kinds, stages = profile_step(step, 1 if quick else 2)
    result = {
        "sizes": vars(sizes),
        "data": vars(data),
        "precision": precision,
        "seconds": seconds,
        "tokens": sum(batch.lengths),
        "operations": {"forward": cost.forward, "backward": cost.backward},
        "bytes": moved,
        "matrix_flops_per_second": matrix_rate,
        "copy_bytes_per_second": bandwidth,
        "share_of_matrix_rate": upper_median(shares),
        "share_of_floor": floor_seconds / medians["step"],
        "profile_seconds": kinds,
        "stage_seconds": stages,
    }
    tables = {
        floor_title(result): floor_frame(result, floor_seconds, medians["step"]),
        profile_title("by kind of operation"): profile_frame(kinds),
        profile_title("by stage"): profile_frame(stages),
    }
    write_report(out, "peak", result, tables)
    return result


def make_yardsticks(precision: str, quick: bool) -> Yardsticks:
    """Return what the machine is measured by, in the precision of the step's products."""
    device = device_name()
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    size = 256 if quick else 1024
    if device == "cuda":
        size = 8192  # a smaller product does not fill a large GPU
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    length = 2**20 if quick else 2**26
    source = torch.empty(length, device=device)
    target = torch.empty(length, device=device)
    flops = 2 * size**3
    products = max(1, int(2e10 / flops))  # about a second of one core
    copies = 4  # of 256 MB, more than any cache holds
    runs: dict[str, Callable[[], Any]] = {
        "products": lambda: [a @ b for _ in range(products)],
        "copies": lambda: [target.copy_(source) for _ in range(copies)],
    }
    return Yardsticks(runs, products * flops, copies * 2 * 4 * length)


def floor_title(result: dict[str, Any]) -> str:
    """Return what of the machine's rates the step reaches."""
    rate = result["matrix_flops_per_second"] / 1e9
    bandwidth = result["copy_bytes_per_second"] / 1e9
    return (
        f"the floor of a step: the machine multiplies matrices at {rate:.0f} GFLOP/s and "
        f"copies {bandwidth:.1f} GB/s; the step reaches {result['share_of_matrix_rate']:.0%} of "
        f"the matrix rate, and the floor is {result['share_of_floor']:.0%} of it"
    )


def floor_frame(result: dict[str, Any], floor_seconds: float, step: float) -> pd.DataFrame:
    """Return the operations and bytes of a step, and the time that they take at least."""
    rows = []
    for name, count in result["operations"].items():
        seconds = count / result["matrix_flops_per_second"]
        rows.append((f"operations, {name}", f"{count / 1e9:.1f} GFLOP", seconds))
    for name, count in result["bytes"].items():
        seconds = count / result["copy_bytes_per_second"]
        rows.append((name, f"{count / 1e9:.3f} GB", seconds))
    rows.append(("operations and bytes, one after the other", "", floor_seconds))
    rows.append(("the step, measured", "", step))
    frame = pd.DataFrame(rows, columns=["", "amount", "ms at that rate"])
    frame["ms at that rate"] = [f"{1000 * seconds:.1f}" for _, _, seconds in rows]
    return frame


def profile_title(parts: str) -> str:
    """Return the title of a profile's table."""
    return f"where the step's time goes, {parts} (torch's profiler)"


def profile_frame(seconds: dict[str, float]) -> pd.DataFrame:
    """Return the parts of a step's time, with their shares."""
    total = sum(seconds.values()) or 1.0
    return pd.DataFrame(
        {
            "": list(seconds),
            "ms": [f"{1000 * value:.1f}" for value in seconds.values()],
            "share": [f"{value / total:.1%}" for value in seconds.values()],
        }
    )
