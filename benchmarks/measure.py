"""What every benchmark needs: models of a size, times taken in turns, tables, plots and files.

What is compared runs in turns, so that a slow minute of the machine falls on all, and a ratio is
the median of those of single turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD

from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.environment import machine
from owlfuse.core.files import write_json
from owlfuse.planning.frames import markdown_table, terminal_table

COLORS = {"concat": "#E69F00", "modality_adaptive": "#56B4E9", "hyperattention": "#009E73"}
"""Of Okabe and Ito's palette, which people who see few colors tell apart."""
WIDTH = 100
"""Columns of a table that goes into a file."""
LIBRARIES = ("torch", "transformers", "lightning", "timm")
Points = Mapping[int, float]
"""By the number of images."""


def device_name() -> str:
    """Return where the benches compute: `cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def card_name() -> str:
    """Return the folder of this machine's results: `h200` for an NVIDIA H200, `cpu` without a
    GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return "-".join(name.split())


def autocast(precision: str) -> AbstractContextManager:
    """Return the context of a forward: `bf16-mixed` has the products in bf16, `32-true` changes
    nothing."""
    return torch.autocast(device_name(), torch.bfloat16, enabled=precision == "bf16-mixed")


def fusion_configs(layers: list[int]) -> dict[str, dict[str, Any]]:
    """Return the fusions that are compared.

    Args:
        layers: those of hyperattention.
    """
    return {
        "concat": {"_target_": "owlfuse.model.fusion.concat.Concat"},
        "modality_adaptive": {
            "_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"
        },
        "hyperattention": {
            "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
            "layers": layers,
        },
    }


def llama_config(
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    **fields: Any,
) -> dict[str, Any]:
    """Return the configuration of a Llama of a size, and of any length that is measured."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 65536,
        **fields,
    }


def full_adapters() -> dict[str, dict[str, str]]:
    """Return the adapters of a model that is trained in all its parts."""
    full = {"_target_": "owlfuse.model.adapters.Full"}
    return dict.fromkeys(("vision", "connector", "fusion", "llm"), full)


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Return how long it takes, the device's work included."""
    # Kernels run on after the call that starts them.
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each of `runs`, `repeats` turns in which each runs once, every second
    turn in the reverse order."""
    device = device_name()
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # In both orders: a run may leave the caches warm for the next one.
    names = list(runs)
    for turn in range(repeats):
        for name in reversed(names) if turn % 2 else names:
            seconds[name].append(seconds_of(runs[name], device))
    return seconds


def upper_median(values: Sequence[float]) -> float:
    """Return the value in the middle, of an even number the upper one of the two."""
    return sorted(values)[len(values) // 2]


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the median of the turns' quotients, and between which two values their middle half
    lies."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    low, high = quotients[0], quotients[0]  # quantiles need two values
    if len(quotients) > 1:
        low, _, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return {"median": statistics.median(quotients), "low": low, "high": high}


def ratio_text(ratio: Mapping[str, float], digits: int = 2) -> str:
    """Return `2.10 (2.05 to 2.20)`."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def slope(points: Mapping[int, float]) -> float:
    """Return the slope of the least-squares line, per image."""
    gradient, _ = np.polyfit(list(points), list(points.values()), deg=1)
    return float(gradient)


def circumstances() -> dict[str, Any]:
    """Return what a number depends on beside the code: machine, versions and day."""
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_report(
    out: Path, name: str, result: dict[str, Any], tables: dict[str, pd.DataFrame]
) -> dict[str, Any]:
    """Prints the tables by title, and writes them as `name`.md and the numbers as `name`.json into
    `out`, which is made. Returns the numbers with what they depend on."""
    result = {**circumstances(), **result}
    versions = ", ".join(f"{library} {number}" for library, number in result["versions"].items())
    heading = f"{result['machine']}; {versions}; {result['date']}"
    parts = [f"# python -m benchmarks {name}\n\n{heading}\n"]
    for title, frame in tables.items():
        print_table(title, frame)
        parts.append(f"\n## {title}\n\n{markdown_table(frame, number_alignment=True)}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)
    (out / f"{name}.md").write_text("".join(parts))
    print(f"{heading}\n{name}.md and {name}.json are in {out}")
    return result


def print_table(title: str, frame: pd.DataFrame) -> None:
    """Prints a table, the first column to the left and the numbers to the right."""
    table = terminal_table(frame, title, box=SIMPLE_HEAD, pad_edge=False)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def draw_lines(axes: Axes, series: Mapping[str, Points], x: str, y: str, title: str) -> None:
    """Draws one line for each series, x in powers of two."""
    for name, points in series.items():
        values = list(points.values())
        axes.plot(list(points), values, marker="o", color=COLORS.get(name), label=name)
    axes.set_xscale("log", base=2)
    counts = {count for points in series.values() for count in points}
    axes.set_xticks(sorted(counts), minor=False)  # the counts that were measured, no powers of ten
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend()


def plot_lines(path: Path, series: Mapping[str, Points], x: str, y: str, title: str) -> None:
    """Writes a plot of one line for each series, x in powers of two."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    draw_lines(axes, series, x, y, title)
    axes.set_ylim(bottom=0)  # differences are seen in proportion
    figure.savefig(path, dpi=150)


def plot_panels(path: Path, panels: Mapping[str, Mapping[str, Points]], x: str) -> None:
    """Writes panels two in a row, each with one line for each series, both axes in powers.

    A panel's name, `title: quantity (unit)`, is its title and the name of its upright axis.
    """
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 3.4 * rows), layout="constrained")
    for axes, (name, series) in zip(figure.subplots(rows, 2).flat, panels.items(), strict=False):
        title, _, y = name.partition(": ")
        draw_lines(axes, series, x, y, title)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
