"""`owlfuse bench train`: peak memory and tokens per second of real training steps against what a
dry run says of them.

Random weights and tokens: neither memory nor time depends on them. B rows, T text positions, I
images of a row.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from owlfuse.config.compose import PlanOptions
from owlfuse.core.types import Batch
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, build_model
from owlfuse.planning.bench.pairs import seconds_of
from owlfuse.planning.bench.report import machine, print_table
from owlfuse.planning.plan import GB, Estimate, Layout, Workload
from owlfuse.planning.step import Precision, meta_batch, size_of
from owlfuse.training.optim import AdamWCosine

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
    },
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
FUSIONS: dict[str, dict[str, Any]] = {
    "concat": {"_target_": "owlfuse.model.fusion.concat.Concat"},
    "modality_adaptive": {"_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"},
    "hyperattention": {
        "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
        "layers": [0, 2, 4, 6],
    },
}


def nodes_of(size: str, fusion: str, checkpointing: bool, compiled: bool) -> dict[str, Any]:
    """The bench's model, everything trained."""
    again = {"gradient_checkpointing": checkpointing}
    llm = {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 65536,
        **SIZES[size],
    }
    return {
        "vision": {
            "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
            **BACKBONES[size],
            **again,
        },
        "connector": {
            "_target_": "owlfuse.model.connectors.abstractor.Abstractor",
            "queries": 16,
            **again,
        },
        "fusion": FUSIONS[fusion],
        "llm": {"_target_": "owlfuse.model.llm.load_llm", "config": llm, **again},
        "adapter": {
            part: {"_target_": "owlfuse.model.adapters.Full"}
            for part in ("vision", "connector", "fusion", "llm")
        },
        "compile": compiled,
    }


def random_batch(model: MultimodalLM, rows: int, length: int, images: int, device: str) -> Batch:
    """B rows of T tokens, their I images at the front; the first row is padded by one, as a
    batch of real lengths is."""
    shapes = meta_batch(model, rows, length, images)
    ids = torch.randint(0, 32000, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    taken = images * model.fusion.tokens_per_image
    placeholder = (torch.arange(length) < taken).expand(rows, -1).clone()
    index = torch.arange(rows * images).view(rows, images) if images else torch.full((rows, 1), -1)
    positions = (
        torch.arange(images) * model.fusion.tokens_per_image if images else torch.full((1,), length)
    )
    batch = Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=ids.masked_fill(placeholder | (mask == 0), -100),
        placeholder=placeholder,
        pixel_values=torch.randn(shapes.pixel_values.shape),
        image_mask=torch.full(shapes.image_mask.shape, images > 0),
        image_index=index,
        image_positions=positions.expand(rows, -1).clone(),
        has_images=images > 0,
    )
    return batch.with_places().to(device)


def profiled_peak(step: Callable[[], Any]) -> int:
    """The most bytes on the CPU at once on top of what was there, by torch's profiler, the
    kernels' own scratch included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [
            event
            for event in json.loads(path.read_text())["traceEvents"]
            if event.get("name") == "[memory]"
        ]
    return max(
        accumulate(
            event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])
        )
    )


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of some products of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(seconds_of(lambda: a @ b, device) for _ in range(10))
    return 2 * size**3 / seconds


def measure(
    nodes: dict[str, Any], precision: Precision, rows: int, length: int, images: int, steps: int
) -> dict[str, Any]:
    """Real steps: the peak of one in bytes, the median of their seconds, and the rate of matrix
    products in their precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(nodes, 32000)[0].to(precision.parameters).train()
    optimizer = AdamWCosine().build(model, steps)["optimizer"]
    batch = random_batch(model, rows, length, images, device)
    batch.pixel_values = batch.pixel_values.to(next(model.parameters()).dtype)

    def step() -> None:
        lower = precision.autocast
        with torch.autocast(device, lower) if lower else nullcontext():
            loss, tokens = batch_loss(model, batch)
        loss.backward()
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # the optimizer's state, compilation, and the libraries' workspaces
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        state = [
            value
            for entry in optimizer.state.values()
            for value in entry.values()
            if torch.is_tensor(value)
        ]
        there = [
            *model.parameters(),
            *model.buffers(),
            *state,
            *filter(torch.is_tensor, vars(batch).values()),
        ]
        peak = size_of(there) + profiled_peak(step)
    seconds = sorted(seconds_of(step, device) for _ in range(steps))[steps // 2]
    dtype = precision.autocast or precision.parameters or torch.float32
    return {
        "peak": peak,
        "seconds": seconds,
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
    """Prints the table, and writes train.json and train.png into `out`.

    Args:
        size: of `SIZES`.
        rows, length, images: B, T and I of a step.
        precision: Lightning's.
        options: `checkpointing` and `compiled`.
    """
    nodes = nodes_of(size, fusion, options["checkpointing"], options["compiled"])
    plain = {
        "model": nodes,
        "optim": {"_target_": "owlfuse.training.optim.AdamWCosine"},
        "trainer": {"precision": precision},
        "data": {"max_length": length, "global_batch_size": rows},
    }
    estimate = Workload(plain, PlanOptions(images_per_sample=images)).estimate(
        Layout(1, 1, False, rows)
    )
    found = measure(nodes, Precision.of(precision), rows, length, images, steps)
    result = {
        "machine": machine(),
        "step": {
            "size": size,
            "fusion": fusion,
            "rows": rows,
            "length": length,
            "images": images,
            "precision": precision,
        },
        "options": options,
        "peak_GB": {"measured": found["peak"] / GB, "planned": estimate.peak / GB},
        "planned_GB": {name: getattr(estimate, name) / GB for name in PARTS},
        "seconds_per_step": found["seconds"],
        "tokens_per_second": rows * length / found["seconds"],
        "flops_per_step": estimate.flops,
        "matmul_tflops": found["rate"] / 1e12,
        "share_of_matmul_rate": estimate.flops / found["seconds"] / found["rate"],
    }
    report(result, estimate, out)
    return result


PARTS = ("parameters", "gradients", "optimizer", "activations")


def report(result: dict[str, Any], estimate: Estimate, out: Path) -> None:
    """The table, and the files."""
    peak = result["peak_GB"]
    rows = [
        ["peak memory, GB", f"{peak['measured']:.3f}", f"{peak['planned']:.3f}"],
        ["planned : measured", "", f"{peak['planned'] / peak['measured']:.3f}"],
        *([f"  {name}, GB", "", f"{result['planned_GB'][name]:.3f}"] for name in PARTS),
        ["seconds a step", f"{result['seconds_per_step']:.3f}", ""],
        ["tokens a second", f"{result['tokens_per_second']:,.0f}", ""],
        ["FLOPs a step", "", f"{estimate.flops:.3g}"],
        ["TFLOP/s of matrix products", f"{result['matmul_tflops']:.3g}", ""],
        ["share of that rate", f"{result['share_of_matmul_rate']:.1%}", ""],
    ]
    print_table(f"training steps ({result['machine']})", ["", "measured", "planned"], rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(out / "train.png", result)
    print(f"train.json and train.png are in {out}")


def plot(path: Path, result: dict[str, Any]) -> None:
    """The peak as measured and as planned, beside the plan's parts."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = {
        **{f"peak, {name}": value for name, value in result["peak_GB"].items()},
        **result["planned_GB"],
    }
    axes.bar(list(bars), list(bars.values()), color=["C1", "C0", *["C7"] * len(PARTS)])
    axes.tick_params("x", rotation=30)
    axes.set(ylabel="GB", title=f"a training step on {result['machine']}")
    figure.savefig(path, dpi=150)
