"""`owlfuse bench images`: time and peak memory of a training step and of prefill against the number
of images, three fusions.

The backbone is left out: visual tokens are random, and both models get the same. Times are taken in
turns in one process; each peak is on top of what was there with imports and model done, on a CPU
that of a process of its own.

N images of a row, Q visual tokens per image, T text positions, D LLM width.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.llm import load_llm
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, make_part
from owlfuse.planning.bench.pairs import device_name, in_turns, lowered, ratios, shown, slope
from owlfuse.planning.bench.report import leave, plot_panels

What = Literal["step", "prefill"]
FUSIONS: dict[str, dict[str, Any]] = {
    "concat": {"_target_": "owlfuse.model.fusion.concat.Concat"},
    "modality_adaptive": {"_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"},
    "hyperattention": {
        "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
        "layers": [0, 3, 6, 9],
    },
}


def llama(width: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Its configuration."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 16384,
    }


SIZES = {
    "small": llama(256, 688, 12, 8),
    "0.4b": llama(1024, 2816, 24, 16),
    "quick": llama(64, 128, 4, 4),
}
"""LLMs: `small` for two CPU cores, `0.4b` for a GPU."""
VOCABULARY, VISUAL_TOKENS, TEXT = 4096, 64, 64
MIB = 2**20


def model_of(fusion: str, llm: dict[str, Any]) -> MultimodalLM:
    """The LLM with this fusion, random weights."""
    torch.manual_seed(0)
    layers = (
        {"layers": [i * llm["num_hidden_layers"] // 4 for i in range(4)]}
        if fusion == "hyperattention"
        else {}
    )
    part = make_part(
        "fusion", {"fusion": {**FUSIONS[fusion], **layers}}, connector_tokens=VISUAL_TOKENS
    )
    with torch.device(device_name()):
        return MultimodalLM(
            nn.Identity(), nn.Identity(), part, load_llm(VOCABULARY, config=llm)
        ).to(device_name())


def batch_of(images: int, per_image: int, width: int) -> tuple[Batch, VisualTokens]:
    """One row: its images, each of `per_image` positions, then text of which the second half is
    supervised."""
    generator = torch.Generator().manual_seed(images)
    taken = images * per_image
    ids = torch.randint(0, VOCABULARY, (1, taken + TEXT), generator=generator)
    here = torch.arange(taken + TEXT)[None]
    index, positions = torch.arange(images)[None], (torch.arange(images) * per_image)[None]
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids.masked_fill(here < taken + TEXT // 2, -100),
        placeholder=here < taken,
        pixel_values=torch.zeros(images, 3, 1, 1),
        image_mask=torch.ones(images, dtype=torch.bool),
        image_index=index,
        image_positions=positions,
    )
    tokens = torch.randn(images, VISUAL_TOKENS, width, generator=generator).to(device_name())
    visual = VisualTokens(tokens, index.to(device_name()), positions.to(device_name()))
    return batch.with_places().to(device_name()), visual


def run_of(what: What, model: MultimodalLM, images: int, precision: str) -> Callable[[], Any]:
    """What is measured: a step of AdamW with a gradient for the visual tokens too; or the prompt's
    last logits, with the keys and values that its answer reads."""
    batch, visual = batch_of(images, model.fusion.tokens_per_image, model.llm.config.hidden_size)
    if what == "prefill":
        return lambda: prefill(model, batch, visual, precision)
    visual.tokens = nn.Parameter(visual.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    make_state(optimizer)

    def step() -> None:
        with lowered(precision):
            loss, tokens = batch_loss(partial(model, visual=visual), batch)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        visual.tokens.grad = None

    return step


@torch.inference_mode()
def prefill(
    model: MultimodalLM, batch: Batch, visual: VisualTokens, precision: str
) -> tuple[Tensor, DynamicCache, VisualTokens]:
    """What the first step of generate does."""
    cache, visual = DynamicCache(config=model.llm.config), replace(visual, kept={})
    with lowered(precision):
        return model(batch, visual, cache, logits_to_keep=1), cache, visual


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state, which is there before any step but the first: of one parameter after
    the other, so that no more memory is taken for it."""
    for group in optimizer.param_groups:
        rate, group["lr"] = group["lr"], 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
        group["lr"] = rate


def peak_of(cell: tuple[What, str, int, dict[str, Any], str, int]) -> float:
    """The most MiB that one run took above model, optimizer state and libraries.

    Called in a process of its own.
    """
    what, fusion, images, llm, precision, threads = cell
    torch.set_num_threads(threads)
    model = model_of(fusion, llm)
    # the libraries' own workspaces
    prefill(model, *batch_of(1, model.fusion.tokens_per_image, llm["hidden_size"]), precision)
    run = run_of(what, model, images, precision)
    if device_name() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - base) / MIB
    base = resident()
    run()
    return (resident() - base) / MIB


def resident() -> int:
    """The most bytes of this process that were ever in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peaks_of(
    counts: list[int], llm: dict[str, Any], precision: str
) -> dict[What, dict[str, dict[int, float]]]:
    """Of every cell; on a CPU each in a process of its own, which a server forks that has done
    the imports and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    same = llm, precision, torch.get_num_threads()
    cells: Any = [
        (what, fusion, n, *same)
        for what in ("step", "prefill")
        for fusion in FUSIONS
        for n in counts
    ]
    # whose allocator tells the peak; to set a device up takes seconds a process
    if device_name() == "cuda":
        values = [peak_of(cell) for cell in cells]
    else:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            values = list(pool.map(peak_of, cells))
    found: dict[Any, dict[str, dict[int, float]]] = {"step": {}, "prefill": {}}
    for (what, fusion, count, *_), value in zip(cells, values, strict=True):
        found[what].setdefault(fusion, {})[count] = value
    return found


def times_of(
    counts: list[int], llm: dict[str, Any], precision: str, repeats: int
) -> dict[What, dict[str, dict[int, list[float]]]]:
    """Milliseconds of every turn, the three fusions in turns for each number of images."""
    models = {name: model_of(name, llm) for name in FUSIONS}
    found: dict[Any, dict[str, dict[int, list[float]]]] = {}
    for what in ("step", "prefill"):
        found[what] = {name: {} for name in FUSIONS}
        for count in counts:
            runs = {name: run_of(what, model, count, precision) for name, model in models.items()}
            for name, seconds in in_turns(runs, repeats).items():
                found[what][name][count] = [1000 * value for value in seconds]
    return found


def over_concat(turns: dict[str, dict[int, list[float]]]) -> dict[str, dict[str, float]]:
    """Of each fusion, concat's ratio to it with the most images."""
    most = max(turns["concat"])
    return {name: ratios(turns["concat"][most], own[most]) for name, own in turns.items()}


def table_of(
    what: str, points: dict[str, dict[int, float]], against: dict[str, Any]
) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and rows: a fusion a row, then its slope and concat's ratio to it."""
    (kind, unit), images, rows = what.split(", "), list(points["concat"]), []
    for name, own in points.items():
        ratio = against[f"{what}, {name}"]
        last = shown(ratio, 1) if unit == "ms" else f"{ratio['median']:.1f}"
        rows.append(
            [
                name,
                *(f"{own[n]:.{1 if own[n] < 1000 else 0}f}" for n in images),
                f"{slope(own):.2f}",
                last,
            ]
        )
    measured = "time, ms (medians)" if unit == "ms" else "peak memory above the process's own, MiB"
    head = ["fusion", *map(str, images), f"{unit} an image", f"concat : it at {images[-1]}"]
    return f"{kind}: {measured}, against images of {VISUAL_TOKENS} visual tokens", head, rows


def bench_images(
    out: Path, images: list[int], repeats: int = 5, precision: str = "32-true", size: str = "small"
) -> dict[str, Any]:
    """Prints the tables, and writes images.md, images.json and images.png into `out`.

    Args:
        images: the numbers of images, ascending, at least two.
        precision: 32-true or bf16-mixed.
        size: of `SIZES`.
    """
    llm = SIZES[size]
    memory, times = peaks_of(images, llm, precision), times_of(images, llm, precision, repeats)
    medians = {
        what: {
            name: {n: sorted(turns)[len(turns) // 2] for n, turns in by_count.items()}
            for name, by_count in by_name.items()
        }
        for what, by_name in times.items()
    }
    against = {
        f"{what}, ms, {name}": ratio
        for what, own in times.items()
        for name, ratio in over_concat(own).items()
    }
    for what, own in memory.items():  # measured once
        once = {name: {n: [value] for n, value in points.items()} for name, points in own.items()}
        against |= {f"{what}, MiB, {name}": ratio for name, ratio in over_concat(once).items()}
    tables = [
        table_of(f"{what}, {unit}", points, against)
        for unit, measured in (("ms", medians), ("MiB", memory))
        for what, points in measured.items()
    ]
    result = {
        "llm": {**llm, "vocab_size": VOCABULARY, "text": TEXT, "visual_tokens": VISUAL_TOKENS},
        "precision": precision,
        "milliseconds": times,
        "MiB": memory,
        "slopes": {
            f"{what}, {unit}": {name: slope(points) for name, points in measured[what].items()}
            for what in times
            for measured, unit in ((medians, "ms"), (memory, "MiB"))
        },
        "concat_over_it": against,
    }
    leave(out, "images", result, tables)
    panels = {
        f"{what}: {label}": measured[what]
        for label, measured in (("time (ms)", medians), ("peak memory (MiB)", memory))
        for what in times
    }
    plot_panels(out / "images.png", panels, f"images of {VISUAL_TOKENS} visual tokens")
    print(f"images.png is in {out}")
    return result
