"""Tables, plots and files of measurements."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD

from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.files import write_json
from owlfuse.planning.frames import markdown_table, terminal_table

COLORS = {"concat": "#E69F00", "modality_adaptive": "#56B4E9", "hyperattention": "#009E73"}
"""Of Okabe and Ito's palette, which people who see few colors tell apart."""
WIDTH = 100
"""Columns of a table that goes into a file."""
LIBRARIES = ("torch", "transformers", "lightning", "timm")
Points = Mapping[int, float]


def machine() -> str:
    """Return the GPU's name, or the processor with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.machine()
    # platform.processor() names no model on Linux.
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return f"{processor}, {torch.get_num_threads()} threads"


def circumstances() -> dict[str, Any]:
    """Return what a number depends on beside the code: machine, versions and day."""
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_report(
    out: Path, name: str, result: dict[str, Any], tables: dict[str, pd.DataFrame]
) -> None:
    """Prints the tables by title, and writes them as `name`.md and the numbers as `name`.json into
    `out`."""
    result = {**circumstances(), **result}
    versions = ", ".join(f"{library} {number}" for library, number in result["versions"].items())
    heading = f"{result['machine']}; {versions}; {result['date']}"
    parts = [f"# owlfuse bench {name}\n\n{heading}\n"]
    for title, frame in tables.items():
        print_table(title, frame)
        parts.append(f"\n## {title}\n\n{markdown_table(frame, number_alignment=True)}")
    write_result(out, name, result)
    (out / f"{name}.md").write_text("".join(parts))
    print(f"{heading}\n{name}.md and {name}.json are in {out}")


def write_result(out: Path, name: str, result: dict[str, Any]) -> None:
    """Writes the numbers as `name`.json into `out`, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)


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
