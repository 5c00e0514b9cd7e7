"""Benchmark `images`: time and peak memory of a training step and of prefill against the number
of images, three fusions.

The backbone is left out: visual tokens are random, and both models get the same. Times are taken in
turns in one process; each peak is on top of what was there with imports and model done, on a CPU
that of a process of its own.

N images of a row, Q visual tokens per image, T text positions, D LLM width.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.measure import (
    autocast,
    device_name,
    fusion_configs,
    llama_config,
    plot_panels,
    ratio_text,
    ratios,
    slope,
    time_interleaved,
    upper_median,
    write_report,
)
from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.connectors.base import Connector
from owlfuse.model.llm import load_llm
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, make_part
from owlfuse.model.vision.base import Backbone
from owlfuse.training.cost import resident

Work = Literal["step", "prefill"]
WORKS: tuple[Work, ...] = ("step", "prefill")
FUSIONS = tuple(fusion_configs([]))
Points = dict[int, float]
"""By the number of images."""
Turns = dict[int, list[float]]
"""Each turn's measurement, by the number of images."""


SIZES = {
    "small": llama_config(256, 688, layers=12, heads=8, key_value_heads=8),
    "0.4b": llama_config(1024, 2816, layers=24, heads=16, key_value_heads=16),
    "quick": llama_config(64, 128, layers=4, heads=4, key_value_heads=4),
}
"""LLMs: `small` for two CPU cores, `0.4b` for a GPU."""
VOCABULARY, VISUAL_TOKENS, TEXT = 4096, 64, 64
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """One peak that is measured."""

    work: Work
    fusion: str
    images: int
    llm: dict[str, Any]
    precision: str
    threads: int


def make_model(fusion: str, llm: dict[str, Any]) -> MultimodalLM:
    """Return the LLM with this fusion, random weights; hyperattention in four layers."""
    torch.manual_seed(0)
    layers = [index * llm["num_hidden_layers"] // 4 for index in range(4)]
    config = fusion_configs(layers)[fusion]
    part = make_part("fusion", {"fusion": config}, connector_tokens=VISUAL_TOKENS)
    with torch.device(device_name()):
        # No backbone and no connector that compute: visual tokens are given.
        model = MultimodalLM(Backbone(), Connector(), part, load_llm(VOCABULARY, config=llm))
    return model.to(device_name())


def make_batch(images: int, positions_per_image: int, width: int) -> tuple[Batch, VisualTokens]:
    """Return one row: its images, then text of which the second half is supervised."""
    generator = torch.Generator().manual_seed(images)
    image_end = images * positions_per_image
    length = image_end + TEXT
    ids = torch.randint(0, VOCABULARY, (1, length), generator=generator)
    position = torch.arange(length)[None]
    batch = Batch.of(
        ids,
        position < image_end,
        (torch.arange(images) * positions_per_image)[None],
        labels=ids.masked_fill(position < image_end + TEXT // 2, -100),
    )
    batch = batch.with_places().to(device_name())
    tokens = torch.randn(images, VISUAL_TOKENS, width, generator=generator).to(device_name())
    return batch, VisualTokens(tokens, batch.image_index, batch.image_positions)


def make_run(work: Work, model: MultimodalLM, images: int, precision: str) -> Callable[[], Any]:
    """Return what is measured: a step of AdamW with a gradient for the visual tokens too; or the
    prompt's last logits, with the keys and values that its answer reads."""
    width = model.llm.config.hidden_size
    batch, visual = make_batch(images, model.fusion.tokens_per_image, width)
    if work == "prefill":
        return lambda: prefill(model, batch, visual, precision)
    # A leaf with a gradient, as the connector that makes them would need it.
    visual.tokens = nn.Parameter(visual.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    make_state(optimizer)

    def step() -> None:
        with autocast(precision):
            loss, tokens = batch_loss(partial(model, visual=visual), batch)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        visual.tokens.grad = None  # it is no parameter of the optimizer

    return step


@torch.inference_mode()
def prefill(
    model: MultimodalLM, batch: Batch, visual: VisualTokens, precision: str
) -> tuple[Tensor, DynamicCache, VisualTokens]:
    """Does what the first step of generate does."""
    # Empty, as before the first token: the second token would find what this one has left.
    cache = DynamicCache(config=model.llm.config)
    visual = replace(visual, kv_cache={})
    with autocast(precision):
        return model(batch, visual, cache, logits_to_keep=1), cache, visual


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's state, which exists before any step but the first.

    One parameter after the other, so that no more memory is taken for it.
    """
    for group in optimizer.param_groups:
        rate = group["lr"]
        group["lr"] = 0.0  # the parameters stay as they are
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
        group["lr"] = rate


def measure_peak(cell: Cell) -> float:
    """Return the most MiB that one run took above model, optimizer state and libraries.

    Called in a process of its own on a CPU, whose peak is never reset.
    """
    torch.set_num_threads(cell.threads)  # a forked process begins with torch's default
    model = make_model(cell.fusion, cell.llm)
    # The libraries' workspaces are made by a first prefill.
    batch, visual = make_batch(1, model.fusion.tokens_per_image, cell.llm["hidden_size"])
    prefill(model, batch, visual, cell.precision)
    run = make_run(cell.work, model, cell.images, cell.precision)
    if device_name() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before = resident("VmHWM")
    run()
    return (resident("VmHWM") - before) / MIB


def peaks_of(
    counts: list[int], llm: dict[str, Any], precision: str
) -> dict[Work, dict[str, Points]]:
    """Return the peak of every cell in MiB; on a CPU each in a process of its own, which a server
    forks that has done the imports and nothing else."""
    threads = torch.get_num_threads()
    cells = []
    for work in WORKS:
        for fusion in FUSIONS:
            for count in counts:
                cells.append(Cell(work, fusion, count, llm, precision, threads))
    if device_name() == "cuda":
        # Its allocator knows the peak; to set a device up takes seconds a process.
        values = [measure_peak(cell) for cell in cells]
    else:
        # A peak of resident memory never falls: a second cell in a process would show the first's.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            values = list(pool.map(measure_peak, cells))
    peaks: dict[Work, dict[str, Points]] = {"step": {}, "prefill": {}}
    for cell, value in zip(cells, values, strict=True):
        peaks[cell.work].setdefault(cell.fusion, {})[cell.images] = value
    return peaks


def times_of(
    counts: list[int], llm: dict[str, Any], precision: str, repeats: int
) -> dict[Work, dict[str, Turns]]:
    """Return the milliseconds of every turn, the three fusions in turns for each number of
    images."""
    models = {name: make_model(name, llm) for name in FUSIONS}
    times: dict[Work, dict[str, Turns]] = {}
    # All models stay in memory: they run in turns.
    for work in WORKS:
        times[work] = {name: {} for name in FUSIONS}
        for count in counts:
            runs = {}
            for name, model in models.items():
                runs[name] = make_run(work, model, count, precision)
            for name, seconds in time_interleaved(runs, repeats).items():
                times[work][name][count] = [1000 * value for value in seconds]
    return times


def over_concat(
    turns: Mapping[str, Mapping[int, Sequence[float]]],
) -> dict[str, dict[str, float]]:
    """Return concat's ratio to each fusion with the most images."""
    most = max(turns["concat"])
    result = {}
    for name, by_count in turns.items():
        result[name] = ratios(turns["concat"][most], by_count[most])
    return result


def work_frame(
    unit: str, points_by_fusion: dict[str, Points], concat_ratios: dict[str, dict[str, float]]
) -> pd.DataFrame:
    """Return a row for each fusion: its points, their slope, and concat's ratio to it."""
    most = max(points_by_fusion["concat"])
    records = []
    for name, points in points_by_fusion.items():
        record = {"fusion": name}
        for count, value in points.items():
            record[str(count)] = f"{value:.1f}" if value < 1000 else f"{value:.0f}"
        record[f"{unit} an image"] = f"{slope(points):.2f}"
        ratio = concat_ratios[name]
        # A peak is measured once: its ratio has no spread.
        text = ratio_text(ratio, 1) if unit == "ms" else f"{ratio['median']:.1f}"
        record[f"concat : it at {most}"] = text
        records.append(record)
    return pd.DataFrame(records)


def bench_images(
    out: Path,
    images: list[int],
    repeats: int = 5,
    precision: str = "32-true",
    size: str = "small",
) -> dict[str, Any]:
    """Prints the tables, and writes images.md, images.json and images.png into `out`.

    Args:
        images: the numbers of images, ascending, at least two.
        precision: 32-true or bf16-mixed.
        size: of `SIZES`.
    """
    # Peaks first: models in this process would take memory from those that are measured.
    llm = SIZES[size]
    memory = peaks_of(images, llm, precision)
    times = times_of(images, llm, precision, repeats)
    tables: dict[str, pd.DataFrame] = {}
    panels: dict[str, dict[str, Points]] = {}
    slopes: dict[str, dict[str, float]] = {}
    concat_over_it: dict[str, dict[str, float]] = {}

    def add(work: str, unit: str, points: dict[str, Points], turns: Any) -> None:
        """Adds a measurement to the report: its points, and the turns behind them."""
        ms = unit == "ms"
        measured = "time, ms (medians)" if ms else "peak memory above the process's own, MiB"
        title = f"{work}: {measured}, against images of {VISUAL_TOKENS} visual tokens"
        concat_ratios = over_concat(turns)
        tables[title] = work_frame(unit, points, concat_ratios)
        panels[f"{work}: {'time (ms)' if ms else 'peak memory (MiB)'}"] = points
        slopes[f"{work}, {unit}"] = {name: slope(values) for name, values in points.items()}
        for name, ratio in concat_ratios.items():
            concat_over_it[f"{work}, {unit}, {name}"] = ratio

    for work, turns in times.items():
        add(work, "ms", map_points(turns, upper_median), turns)
    for work, points in memory.items():
        add(work, "MiB", points, map_points(points, lambda value: [value]))
    result = {
        "llm": {**llm, "vocab_size": VOCABULARY, "text": TEXT, "visual_tokens": VISUAL_TOKENS},
        "precision": precision,
        "milliseconds": times,
        "MiB": memory,
        "slopes": slopes,
        "concat_over_it": concat_over_it,
    }
    write_report(out, "images", result, tables)
    plot_panels(out / "images.png", panels, f"images of {VISUAL_TOKENS} visual tokens")
    print(f"images.png is in {out}")
    return result


def map_points(
    by_fusion: Mapping[str, Mapping[int, Any]], function: Callable[[Any], Any]
) -> dict[str, dict[int, Any]]:
    """Return what a function makes of each point."""
    result = {}
    for name, points in by_fusion.items():
        result[name] = {count: function(value) for count, value in points.items()}
    return result
