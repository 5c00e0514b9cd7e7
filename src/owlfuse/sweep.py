"""`owlfuse train -m`: a run of every combination of listed values, and a table of their metrics."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from owlfuse import config


def sweep(overrides: list[str]) -> None:
    """Every cell is composed and checked before the first trains; the table stands at the end, also after a failure."""
    cells = config.sweep_cells(overrides)
    composed = [config.compose(cell) for cell in cells]
    from owlfuse import train  # imports torch; a mistake is told before

    rows: list[tuple[list[str], Path | None]] = []
    try:
        for cell, configuration in zip(cells, composed, strict=True):
            rows.append((cell, train.run(configuration)))
    finally:
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
            print_table(rows, len(cells))


def print_table(rows: list[tuple[list[str], Path | None]], cells: int) -> None:
    """One line a run, what differs between them in front."""
    metrics = [metrics_of(folder) for _, folder in rows]
    names = list(dict.fromkeys(name for row in metrics for name in row))
    shared = set.intersection(*(set(cell) for cell, _ in rows)) if len(rows) > 1 else set()
    table = Table("overrides", "run", *names, title=f"{len(rows)} of {cells} runs", caption=" ".join(sorted(shared)))
    for (cell, folder), row in zip(rows, metrics, strict=True):
        own = " ".join(o for o in cell if o not in shared)
        table.add_row(own, str(folder or ""), *(f"{row[n]:.4g}" if n in row else "" for n in names))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def metrics_of(folder: Path | None) -> dict[str, float]:
    """The numbers of a run's results.json; none where there is no such file yet."""
    with contextlib.suppress(FileNotFoundError):
        if folder is not None:
            metrics = json.loads((Path(folder) / "results.json").read_text())["metrics"]
            return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {}
