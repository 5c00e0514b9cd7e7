"""The plots of an ablation, each as PNG and SVG: scores with intervals, learning curves, score
against cost.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; markers and line styles
tell the cells apart too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from owlfuse.core.errors import DataError
from owlfuse.studies.ablation.results import COSTS, SHARE_METRICS, Results, Row, Score

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "owlfuse",  # ids in an SVG are random without it
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}
MAX_PANELS = 4
"""Metrics beside each other in the plot of scores."""


def write_plots(results: Results, folder: Path) -> dict[str, Path]:
    """Writes PNG and SVG of each plot, and returns the SVGs by name."""
    plots = {
        "scores": scores,
        "learning_curves": learning_curves,
        "score_against_cost": score_against_cost,
    }
    files = {}
    with matplotlib.rc_context(SETTINGS):
        for name, draw in plots.items():
            figure = draw(results)
            figure.savefig(folder / f"{name}.png", dpi=150)
            # Without the date the same results give the same bytes.
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            files[name] = folder / f"{name}.svg"
    return files


def new_figure(width: float, height: float) -> Figure:
    """Return a figure that no window knows of."""
    # pyplot would keep it, and may ask for a display.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style(index: int) -> dict[str, Any]:
    """Return the color and marker of the cell with an index: no two of the first 70 are alike."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def wrapped(name: str) -> str:
    """Return a cell's name on lines of at most 22 characters, for matplotlib."""
    name = plain(name)
    # textwrap breaks lines at blanks alone: each hyphen gets one, which is removed afterwards.
    lines = textwrap.wrap(name.replace("-", "- "), 22)
    return "\n".join(lines).replace("- ", "-")


def scores(results: Results) -> Figure:
    """Draws a line for each cell: the mean with its interval, and small marks for the seeds."""
    metrics = results.metrics[:MAX_PANELS]
    rows = results.rows
    figure = new_figure(2.2 + 2.6 * len(metrics), 1.3 + 0.5 * len(rows))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        baseline = rows[0].scores[metric].mean
        if baseline is not None:
            axes.axvline(baseline, color="#999999", linewidth=1, linestyle=":", zorder=0)
        for index, row in enumerate(rows):
            draw_score(axes, row.scores[metric], index)
        axes.set_xlabel(metric_label(metric))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", **GRID)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(rows)), [wrapped(row.name) for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)  # the baseline on top
    panels[0].set_ylabel("cell")
    figure.suptitle(
        "Scores: mean, 95% interval over questions and seeds, seeds as |; dotted: baseline",
        fontsize=10,
    )
    return figure


def draw_score(axes: Axes, score: Score, index: int) -> None:
    """Draws a cell's score on the line with its index, the seeds a little below it."""
    marks = style(index)
    values = list(score.values.values())
    axes.plot(values, [index + 0.22] * len(values), "|", color=marks["color"], markersize=7)
    if score.mean is not None:
        low, high = score.interval or (score.mean, score.mean)
        axes.plot([low, high], [index, index], color=marks["color"], linewidth=2.2)
        axes.plot([score.mean], [index], **marks, markersize=8)


def learning_curves(results: Results) -> Figure:
    """Draws the loss in training, a running mean, and on the score's validation source; mean over
    seeds, their range shaded."""
    source = results.record["metrics"][results.metrics[0]][0]
    figure = new_figure(9, 4.2 + 0.16 * len(results.rows))
    panels = figure.subplots(1, 2)
    labels = {
        "train/loss": "training loss (nats per token)",
        f"{source}/loss": f"loss on {plain(source)} (nats per token)",
    }
    for axes, (column, label) in zip(panels, labels.items()):
        for index, row in enumerate(results.rows):
            curves = shared_curves(row, column)
            # Single batches are noisy: a window of a twentieth of the steps.
            if column == "train/loss":
                curves = curves.rolling(max(1, len(curves) // 20)).mean().dropna()
            if not curves.empty:
                draw_curve(axes, curves, row.name, index)
        axes.set(xlabel="optimizer steps", ylabel=label)
        axes.grid(**GRID)
    add_legend(figure, panels)
    return figure


def draw_curve(axes: Axes, curves: pd.DataFrame, name: str, index: int) -> None:
    """Draws the mean of a cell's curves, and their range where there are several."""
    marks = style(index)
    marks["linestyle"] = LINES[index % len(LINES)]
    # About six markers: a marker at each step would hide the line.
    marks["markevery"] = max(1, len(curves) // 6)
    steps = curves.index.to_numpy()
    axes.plot(steps, curves.mean(axis=1), **marks, markersize=5, linewidth=1.6, label=plain(name))
    if curves.shape[1] > 1:
        low, high = curves.min(axis=1), curves.max(axis=1)
        axes.fill_between(steps, low, high, color=marks["color"], alpha=0.15, linewidth=0)


def shared_curves(row: Row, column: str) -> pd.DataFrame:
    """Return a column of the runs' metrics.csv, a column for each seed, at the optimizer steps
    that all of them have, counted from 1."""
    curves = {}
    for run in row.finished:
        path = run.folder / "metrics.csv"
        try:
            metrics = pd.read_csv(path, index_col="step") if path.exists() else pd.DataFrame()
        except ValueError as error:  # which pandas' own errors are
            raise DataError(f"{path} is not as owlfuse writes it: {error}") from error
        if column in metrics:
            # A resumed run may have a step twice: the later value counts.
            curve = metrics[column].dropna()
            curves[run.seed] = curve[~curve.index.duplicated(keep="last")]
    frame = pd.DataFrame(curves).dropna()  # the steps that all seeds have
    frame.index = frame.index + 1
    return frame


def score_against_cost(results: Results) -> Figure:
    """Draws the score over throughput, memory, and time per generated token, each with its
    interval."""
    names = [name for name in COSTS if name != "trained_parameters"]
    metric = results.metrics[0]
    figure = new_figure(10, 3.8 + 0.16 * len(results.rows))
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names):
        cost = COSTS[name]
        for index, row in enumerate(results.rows):
            score, value = row.scores[metric], row.cost(name)
            if score.mean is None or value is None:
                continue
            value *= cost.scale
            low, high = score.interval or (score.mean, score.mean)
            marks = style(index)
            axes.plot([value, value], [low, high], color=marks["color"], linewidth=1.6)
            axes.plot([value], [score.mean], **marks, ms=8, linestyle="none", label=plain(row.name))
        axes.set_xlabel(f"{cost.title} ({cost.unit})")
        axes.margins(x=0.15)  # no marker lies on the frame
        axes.locator_params(axis="x", nbins=4)
        axes.grid(**GRID)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(metric_label(metric))
    add_legend(figure, panels)
    return figure


def metric_label(metric: str) -> str:
    """Return a metric's name, with its unit where it has one."""
    is_share = any(name in metric for name in SHARE_METRICS)
    return plain(f"{metric} (share right)" if is_share else metric)


def plain(name: str) -> str:
    """Return a name in which matplotlib sees no formula."""
    return name.replace("$", r"\$")


def add_legend(figure: Figure, panels: Sequence[Axes] | np.ndarray) -> None:
    """Draws one legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        artists, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, artists))
    if not handles:
        return
    # About 90 characters fit into a line, of which a line style and its gap take 6.
    longest = max(len(label) for label in handles)
    columns = max(1, min(4, len(handles), 90 // (6 + longest)))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
