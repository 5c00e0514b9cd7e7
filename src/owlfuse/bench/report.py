"""Tables and plots of measurements."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine() -> str:
    """The GPU's name, or the processor with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def cpu_lines() -> list[str]:
    """/proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table, the first column to the left and the numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def plot_lines(path: Path, series: dict[str, dict[int, float]], x: str, y: str, title: str) -> None:
    """One line a series, x in powers of two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({n for points in series.values() for n in points}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend()
    figure.savefig(path, dpi=150)
