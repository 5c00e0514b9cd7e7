"""Benchmark `train`: peak memory and tokens per second of real training steps against what a
dry run says of them.

Random weights and tokens: neither memory nor time depends on them. B rows, T text positions, I
images of a row.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.measure import (
    device_name,
    full_adapters,
    fusion_configs,
    llama_config,
    seconds_of,
    upper_median,
    write_report,
)
from owlfuse.config.compose import PlanOptions
from owlfuse.core.types import Batch, image_starts
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, build_model
from owlfuse.parallel.collectives import divide
from owlfuse.planning.plan import GB, Layout, Workload
from owlfuse.planning.step import Precision, bytes_of, meta_batch
from owlfuse.training.optim import AdamWCosine

VOCABULARY = 32000
SIZES: dict[str, dict[str, Any]] = {
    "tiny": llama_config(256, 512, layers=8, heads=8, key_value_heads=4, vocab_size=VOCABULARY),
    "1b": llama_config(2048, 5632, layers=22, heads=32, key_value_heads=4, vocab_size=VOCABULARY),
}
"""LLMs; `1b` has the shape of TinyLlama (arXiv 2401.02385)."""
BACKBONES: dict[str, dict[str, Any]] = {
    "tiny": {
        "name": "vit_tiny_patch16_224",
        "image_size": 64,
        "kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2},
    },
    "1b": {"name": "vit_large_patch14_clip_224"},
}
FUSIONS = fusion_configs([0, 2, 4, 6])
PARTS = ("parameters", "gradients", "optimizer", "activations")
"""Fields of an estimate that the table shows."""


def make_configs(size: str, fusion: str, checkpointing: bool, compiled: bool) -> dict[str, Any]:
    """Return the configurations of the bench's model, everything trained."""
    options = {"gradient_checkpointing": checkpointing}
    vision = {"_target_": "owlfuse.model.vision.backbone.TimmBackbone", **BACKBONES[size]}
    connector = {"_target_": "owlfuse.model.connectors.abstractor.Abstractor", "queries": 16}
    return {
        "vision": {**vision, **options},
        "connector": {**connector, **options},
        "fusion": FUSIONS[fusion],
        "llm": {"_target_": "owlfuse.model.llm.load_llm", "config": SIZES[size], **options},
        "adapter": full_adapters(),
        "compile": compiled,
    }


def random_batch(model: MultimodalLM, rows: int, length: int, images: int, device: str) -> Batch:
    """Return B rows of T tokens, their I images at the front; the first row is padded by one, as a
    batch of real lengths is."""
    shapes = meta_batch(model, rows, length, images)
    # One padded position: without any, attention takes a path without a mask.
    ids = torch.randint(0, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    tokens_per_image = model.fusion.tokens_per_image
    is_image = torch.arange(length) < images * tokens_per_image
    placeholder = is_image.expand(rows, -1).clone()
    starts = [image * tokens_per_image for image in range(images)]
    batch = Batch.of(
        ids,
        placeholder,
        image_starts([starts] * rows, length),
        pixel_values=torch.randn(shapes.pixel_values.shape),
        attention_mask=mask,
        labels=ids.masked_fill(placeholder | (mask == 0), -100),
    )
    return batch.with_places().to(device)


def profiled_peak(step: Callable[[], Any]) -> int:
    """Return the most bytes on the CPU at once on top of what was there, by torch's profiler, the
    kernels' own scratch included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = [event for event in trace if event.get("name") == "[memory]"]
    # Each event is a difference, in the order of time; their running sum is what is alive.
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of the best of some products of two square matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    # The best: what else the machine does makes a product slower, never faster.
    seconds = min(seconds_of(lambda: a @ b, device) for _ in range(10))
    return 2 * size**3 / seconds


def make_step(
    model: MultimodalLM, batch: Batch, optimizer: torch.optim.Optimizer, precision: Precision
) -> Callable[[], None]:
    """Return a training step: forward, backward, clipping and the optimizer's."""

    def step() -> None:
        context: AbstractContextManager = nullcontext()
        if precision.autocast:
            context = torch.autocast(batch.input_ids.device.type, precision.autocast)
        with context:
            loss, tokens = batch_loss(model, batch)
        loss.backward()
        divide([p.grad for p in model.parameters() if p.grad is not None], tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    configs: dict[str, Any],
    precision: Precision,
    rows: int,
    length: int,
    images: int,
    steps: int,
) -> dict[str, Any]:
    """Return of real steps: the peak of one in bytes, the median of their seconds, and the rate of
    matrix products in their precision."""
    device = device_name()
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(configs, VOCABULARY)[0].to(precision.parameters).train()
    optimizer = AdamWCosine().build(model, steps)["optimizer"]
    batch = random_batch(model, rows, length, images, device)
    # As Lightning casts inputs with a true half precision.
    batch.pixel_values = batch.pixel_values.to(next(model.parameters()).dtype)
    step = make_step(model, batch, optimizer, precision)
    for _ in range(2):  # the optimizer's state, compilation, and the libraries' workspaces
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        # The profiler counts from zero: what was there before is added.
        resident = [*model.parameters(), *model.buffers()]
        for state in optimizer.state.values():
            resident += filter(torch.is_tensor, state.values())
        resident += filter(torch.is_tensor, vars(batch).values())
        peak = bytes_of(resident) + profiled_peak(step)
    dtype = precision.autocast or precision.parameters or torch.float32
    return {
        "peak": peak,
        "seconds": upper_median([seconds_of(step, device) for _ in range(steps)]),
        "rate": matmul_rate(device, dtype, 8192 if device == "cuda" else 1024),
    }


def bench_train(
    size: str,
    fusion: str,
    rows: int,
    length: int,
    images: int,
    steps: int,
    precision: str,
    out: Path,
    **options: bool,
) -> dict[str, Any]:
    """Prints the table, and writes train.md, train.json and train.png into `out`.

    Args:
        size: of `SIZES`.
        rows, length, images: B, T and I of a step.
        precision: Lightning's.
        options: `checkpointing` and `compiled`.
    """
    configs = make_configs(size, fusion, options["checkpointing"], options["compiled"])
    run_config = {
        "model": configs,
        "optim": {"_target_": "owlfuse.training.optim.AdamWCosine"},
        "trainer": {"precision": precision},
        "data": {"max_length": length, "global_batch_size": rows},
    }
    # One GPU, all rows in one micro batch: as it is measured.
    workload = Workload(run_config, PlanOptions(images_per_sample=images))
    estimate = workload.estimate(Layout(1, 1, False, rows))
    measured = measure(configs, Precision.of(precision), rows, length, images, steps)
    seconds, rate = measured["seconds"], measured["rate"]
    result = {
        "step": {
            "size": size,
            "fusion": fusion,
            "rows": rows,
            "length": length,
            "images": images,
            "precision": precision,
        },
        "options": options,
        "peak_GB": {"measured": measured["peak"] / GB, "planned": estimate.peak / GB},
        "planned_GB": {name: getattr(estimate, name) / GB for name in PARTS},
        "seconds_per_step": seconds,
        "tokens_per_second": rows * length / seconds,
        "flops_per_step": estimate.flops,
        "matmul_tflops": rate / 1e12,
        "share_of_matmul_rate": estimate.flops / seconds / rate,
    }
    result = write_report(out, "train", result, {"training steps": result_frame(result)})
    plot(out / "train.png", result)
    print(f"train.png is in {out}")
    return result


def result_frame(result: dict[str, Any]) -> pd.DataFrame:
    """Return what was measured beside what was planned."""
    peak = result["peak_GB"]
    rows = [
        ("peak memory, GB", f"{peak['measured']:.3f}", f"{peak['planned']:.3f}"),
        ("planned : measured", "", f"{peak['planned'] / peak['measured']:.3f}"),
    ]
    for name, size in result["planned_GB"].items():
        rows.append((f"  {name}, GB", "", f"{size:.3f}"))
    rows += [
        ("seconds a step", f"{result['seconds_per_step']:.3f}", ""),
        ("tokens a second", f"{result['tokens_per_second']:,.0f}", ""),
        ("FLOPs a step", "", f"{result['flops_per_step']:.3g}"),
        ("TFLOP/s of matrix products", f"{result['matmul_tflops']:.3g}", ""),
        ("share of that rate", f"{result['share_of_matmul_rate']:.1%}", ""),
    ]
    return pd.DataFrame(rows, columns=["", "measured", "planned"])


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draws the peak as measured and as planned, beside the plan's parts."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = {f"peak, {name}": value for name, value in result["peak_GB"].items()}
    bars |= result["planned_GB"]
    axes.bar(list(bars), list(bars.values()), color=["C1", "C0", *["C7"] * len(PARTS)])
    axes.tick_params("x", rotation=30)
    axes.set(ylabel="GB", title=f"a training step on {result['machine']}")
    figure.savefig(path, dpi=150)
