"""Tables and plots of measurements."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from owlfuse.core.console import PlainConsole as Console

COLOURS = {"concat": "#E69F00", "modality_adaptive": "#56B4E9", "hyperattention": "#009E73"}
"""Of Okabe and Ito's palette, which people who see few colours tell apart."""
WIDTH = 100
"""Columns of a table that goes into a file."""
LIBRARIES = ("torch", "transformers", "lightning", "timm")


def machine() -> str:
    """The GPU's name, or the processor with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def cpu_lines() -> list[str]:
    """/proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def circumstances() -> dict[str, Any]:
    """What a number depends on beside the code: machine, versions and day."""
    versions = {name: version(name) for name in LIBRARIES}
    return {
        "machine": machine(),
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def leave(
    out: Path,
    name: str,
    result: dict[str, Any],
    tables: list[tuple[str, list[str], list[list[str]]]],
) -> None:
    """Prints the tables (title, head, rows), and writes them as `name`.md and the numbers as
    `name`.json into `out`."""
    result = {**circumstances(), **result}
    around = (
        f"{result['machine']}; "
        f"{', '.join(f'{k} {v}' for k, v in result['versions'].items())}; {result['date']}"
    )
    written = [f"# owlfuse bench {name}\n\n{around}\n"]
    for title, head, rows in tables:
        print_table(title, head, rows)
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        written.append(f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / f"{name}.md").write_text("".join(written))
    print(f"{around}\n{name}.md and {name}.json are in {out}")


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table, the first column to the left and the numbers to the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def plot_lines(path: Path, series: dict[str, dict[int, float]], x: str, y: str, title: str) -> None:
    """One line a series, x in powers of two."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(
            list(points), list(points.values()), marker="o", color=COLOURS.get(name), label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({n for points in series.values() for n in points}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_panels(path: Path, panels: dict[str, dict[str, dict[int, float]]], x: str) -> None:
    """Panels two in a row, each with one line a series, both axes in powers. A panel's name,
    `title: quantity (unit)`, is its title and the name of its upright axis."""
    figure = Figure(figsize=(9, 3.4 * -(-len(panels) // 2)), layout="constrained")
    for axes, (name, series) in zip(
        figure.subplots(-(-len(panels) // 2), 2).flat, panels.items(), strict=False
    ):
        title, _, y = name.partition(": ")
        for own, points in series.items():
            axes.plot(
                list(points), list(points.values()), marker="o", color=COLOURS.get(own), label=own
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({n for points in series.values() for n in points}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
