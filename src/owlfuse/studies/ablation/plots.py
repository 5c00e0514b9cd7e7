"""The plots of an ablation, each as PNG and SVG: scores with intervals, learning curves, score
against cost.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; markers and line styles
tell the cells apart too.
"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.studies.ablation.results import COSTS, SHARES, Results, Row

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "owlfuse",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PANELS = 4
"""Metrics beside each other in the plot of scores."""


def write_plots(results: Results, folder: Path) -> dict[str, Path]:
    """Writes PNG and SVG of each plot; the SVGs by what they show."""
    import matplotlib

    plots = {
        "scores": scores,
        "learning_curves": learning_curves,
        "score_against_cost": score_against_cost,
    }
    found = {}
    with matplotlib.rc_context(SETTINGS):
        for name, draw in plots.items():
            figure = draw(results)
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            found[name] = folder / f"{name}.svg"
    return found


def new_figure(width: float, height: float) -> Any:
    """A figure that no window knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style(index: int) -> dict[str, Any]:
    """Of the cell at a place: no two of the first 70 are alike."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def wrapped(name: str, width: int = 22) -> str:
    """A cell's name on lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(name.replace("-", "- "), width, break_long_words=True)).replace(
        "- ", "-"
    )


def scores(results: Results) -> Any:
    """A line a cell: the mean with its interval, and small marks for the seeds."""
    metrics, rows = results.metrics[:PANELS], results.rows
    figure = new_figure(2.2 + 2.6 * len(metrics), 1.3 + 0.5 * len(rows))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        base = rows[0].scores[metric].mean
        if base is not None:
            axes.axvline(base, color="#999999", linewidth=1, linestyle=":", zorder=0)
        for index, row in enumerate(rows):
            found, look = row.scores[metric], style(index)
            axes.plot(
                list(found.values.values()),
                [index + 0.22] * len(found.values),
                "|",
                color=look["color"],
                markersize=7,
            )
            if found.mean is not None:
                low, high = found.interval or (found.mean, found.mean)
                axes.plot([low, high], [index, index], color=look["color"], linewidth=2.2)
                axes.plot([found.mean], [index], **look, markersize=8)
        axes.set_xlabel(labelled(metric))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(rows)), [wrapped(row.name) for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    panels[0].set_ylabel("cell")
    figure.suptitle(
        "Scores: mean, 95% interval over questions and seeds, seeds as |; dotted: baseline",
        fontsize=10,
    )
    return figure


def learning_curves(results: Results) -> Any:
    """Loss in training, a running mean, and on the score's validation source; mean over seeds,
    their range shaded."""
    source = results.record["metrics"][results.metrics[0]][0]
    figure = new_figure(9, 4.2 + 0.16 * len(results.rows))
    panels = figure.subplots(1, 2)
    named = (
        ("train/loss", "training loss (nats per token)"),
        (f"{source}/loss", f"loss on {source} (nats per token)"),
    )
    for axes, (column, label) in zip(panels, named):
        for index, row in enumerate(results.rows):
            steps, curves = shared_curve(row, column, smooth=column == "train/loss")
            if not len(steps):
                continue
            look = style(index)
            look |= {
                "linestyle": LINES[index % len(LINES)],
                "markevery": max(1, len(steps) // 6),
                "markersize": 5,
            }
            axes.plot(steps, curves.mean(axis=0), **look, linewidth=1.6, label=row.name)
            if len(curves) > 1:
                axes.fill_between(
                    steps,
                    curves.min(axis=0),
                    curves.max(axis=0),
                    color=look["color"],
                    alpha=0.15,
                    linewidth=0,
                )
        axes.set(xlabel="optimizer steps", ylabel=label)
        axes.grid(color="#dddddd", linewidth=0.6)
    legend(figure, panels)
    return figure


def shared_curve(row: Row, column: str, smooth: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all seeds have, and the values of each seed there, (seeds, steps)."""
    found = [
        curve for run in row.finished if (curve := read_curve(run.folder / "metrics.csv", column))
    ]
    if not found:
        return np.zeros(0), np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(curve) for curve in found)))
    curves = np.array([[curve[step] for step in steps] for curve in found])
    width = max(1, len(steps) // 20) if smooth else 1
    if width > 1:
        kernel = np.ones(width) / width
        curves = np.stack([np.convolve(curve, kernel, mode="valid") for curve in curves])
        steps = steps[width - 1 :]
    return np.array(steps), curves


def read_curve(path: Path, column: str) -> dict[int, float]:
    """A column of metrics.csv by optimizer step, counted from 1."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                int(line["step"]) + 1: float(line[column])
                for line in csv.DictReader(file)
                if line.get(column)
            }
    except FileNotFoundError:
        return {}


def score_against_cost(results: Results) -> Any:
    """The score over throughput, memory, and time per generated token, each with its interval."""
    names = [name for name in COSTS if name != "trained_parameters"]
    metric = results.metrics[0]
    figure = new_figure(10, 3.8 + 0.16 * len(results.rows))
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names):
        for index, row in enumerate(results.rows):
            found, cost = row.scores[metric], row.cost(name)
            if found.mean is None or cost is None:
                continue
            low, high = found.interval or (found.mean, found.mean)
            look = style(index)
            axes.plot([cost, cost], [low, high], color=look["color"], linewidth=1.6)
            axes.plot([cost], [found.mean], **look, markersize=8, linestyle="none", label=row.name)
        what, unit = COSTS[name]
        axes.set_xlabel(f"{what} ({unit})")
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(labelled(metric))
    legend(figure, panels)
    return figure


def labelled(metric: str) -> str:
    """With its unit where it has one."""
    return f"{metric} (share right)" if any(name in metric for name in SHARES) else metric


def legend(figure: Any, panels: Any) -> None:
    """One for all panels, below them."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())
    }
    if handles:
        columns = max(1, min(4, len(handles), 90 // (6 + max(map(len, handles)))))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            fontsize=9,
            frameon=False,
        )
