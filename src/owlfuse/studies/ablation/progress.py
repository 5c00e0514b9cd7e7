"""What a terminal shows of an ablation: the plan before it, and which cell is how far.

Without a terminal, plain lines.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.console import count
from owlfuse.core.files import read_json_if_there
from owlfuse.core.terminal import cell as table_cell
from owlfuse.studies.ablation import launch
from owlfuse.studies.ablation.file import Ablation
from owlfuse.studies.ablation.grid import Cell

WIDTH = 100
"""Columns that all tables fit into."""
QUIET = 300.0
"""Seconds without a line after which a log, which has no bars, is told how far the running cells
are."""


def console() -> Console:
    """At most WIDTH columns wide."""
    return Console(width=min(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH)


def print_plan(
    ablation: Ablation, folder: Path, cells: list[Cell], left: list[Cell], jobs: int
) -> None:
    """The cells with parameters trained and steps, what is finished, and an estimate of the
    time."""
    out = console()
    out.print(Text.assemble((ablation.name, "bold"), f": {ablation.question}"), highlight=False)
    table = Table(title_justify="left", caption_justify="left")
    for name in ("cell", "seeds", "trained, about", "steps", "finished"):
        table.add_column(name, justify="left" if name == "cell" else "right", overflow="fold")
    for name in dict.fromkeys(cell.name for cell in cells):
        mine = [cell for cell in cells if cell.name == name]
        done = sum(cell not in left for cell in mine)
        seeds = ",".join(str(cell.seed) for cell in mine)
        table.add_row(
            name, seeds, count(mine[0].trained), f"{mine[0].steps:,}", f"{done} of {len(mine)}"
        )
    out.print(table)
    steps = sum(cell.steps for cell in left)
    seconds = seconds_per_step(folder, cells)
    said = f"{len(left)} of {len(cells)} runs are left, {steps:,} steps"
    if left and seconds:
        said += f", about {duration(steps * seconds / jobs)} by the finished runs"
    elif left:
        said += "; how long they take shows with the first"
    if ablation.minutes:
        said += f"; none is begun after {ablation.minutes:g} min"
    if ablation.steps:
        said += f"; at most {ablation.steps:,} steps are begun"
    out.print(said, highlight=False)


def seconds_per_step(folder: Path, cells: list[Cell]) -> float | None:
    """With all that a run does beside its steps: of finished runs here, else of those of the same
    experiment that were trained alone."""
    states = [(cell.steps, read_json_if_there(folder / cell.key / launch.STATE)) for cell in cells]
    here = [
        (state["ended"] - state["began"]) / steps
        for steps, state in states
        if state.get("state") == "finished"
    ]
    if here:
        return sum(here) / len(here)
    found: list[dict[str, Any]] = []
    if base := cells[0].words[0].partition("=")[2]:
        found = [read_json_if_there(path) for path in (folder.parent / base).glob("*/results.json")]
    rates = [results["wall_s"] / results["steps"] for results in found if results.get("steps")]
    return sum(rates) / len(rates) if rates else None


def duration(seconds: float) -> str:
    """95 -> 2 min, 30 -> 30 s, 9000 -> 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def shown(folder: Path, cells: list[Cell], left: list[Cell], jobs: int) -> Iterator[None]:
    """Watches the cells' files from a thread until the block is left."""
    view = View(folder, cells, left, jobs)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            view.update()
        view.update()

    thread = threading.Thread(target=look, daemon=True)
    with view.progress:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class View:
    """A line for the whole and one for each running cell; a line stays for each that has ended."""

    def __init__(self, folder: Path, cells: list[Cell], left: list[Cell], jobs: int) -> None:
        self.folder, self.left, self.jobs = folder, left, jobs
        self.began = time.time()
        self.spoke = self.began
        self.live = sys.stdout.isatty()
        self.console = console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.progress = Progress(
            *columns, console=self.console, disable=not self.live, transient=True
        )
        self.steps = sum(cell.steps for cell in left)
        self.whole = self.progress.add_task(f"{len(left)} runs", total=self.steps, said="")
        self.tasks: dict[str, Any] = {}
        self.told: dict[str, str] = {}

    def update(self) -> None:
        """Reads the states and says what is new."""
        done, running = 0, {}
        for cell in self.left:
            run = self.folder / cell.key
            state = read_json_if_there(run / launch.STATE)
            if state.get("began", 0) < self.began:
                continue
            step = read_json_if_there(run / "progress.json").get("step", 0)
            if state["state"] == "running":
                running[cell.key] = step, cell.steps
                done += step
            else:
                done += cell.steps  # nothing of it is left to do
            if self.told.get(cell.key) != state["state"]:
                self.told[cell.key] = state["state"]
                self.say(cell, state)
        if self.live:
            self.show(done, running)
        elif running and time.time() - self.spoke >= QUIET:
            for key, (step, steps) in running.items():
                self.line(
                    f"{self.place(key)}: {phase(step, steps) or f'step {step:,} of {steps:,}'}",
                    done,
                )

    def line(self, said: str, done: int) -> None:
        """A line, with the time that is left where anything is."""
        left = self.time_left(done) if done < self.steps else ""
        self.console.print(f"{said}; {left}" if left else said, highlight=False, markup=False)
        self.spoke = time.time()

    def place(self, key: str) -> str:
        """Which of the cells."""
        return f"{[cell.key for cell in self.left].index(key) + 1}/{len(self.left)} {key}"

    def time_left(self, done: int) -> str:
        """Of the whole, at the pace until now."""
        return (
            f"about {duration((time.time() - self.began) * (self.steps - done) / done)} left"
            if done
            else ""
        )

    def show(self, done: int, running: dict[str, tuple[int, int]]) -> None:
        """The bars."""
        self.progress.update(self.whole, completed=done, said=self.time_left(done))
        for key, (step, steps) in running.items():
            if key not in self.tasks:
                self.tasks[key] = self.progress.add_task(
                    table_cell(f"  {shortened(key)}"), total=steps, said=""
                )
            self.progress.update(self.tasks[key], completed=step, said=phase(step, steps))
        for key in [key for key in self.tasks if key not in running]:
            self.progress.remove_task(self.tasks.pop(key))

    def say(self, cell: Cell, state: dict[str, Any]) -> None:
        """A line when a cell begins (where there are no bars) and when it has ended."""
        if state["state"] == "running":
            if not self.live:
                self.line(f"{self.place(cell.key)}: began, {cell.steps:,} steps", 0)
            return
        took = f" in {duration(state['ended'] - state['began'])}" if "ended" in state else ""
        error = f": {state['error']}" if state.get("error") else ""
        done = sum(
            other.steps for other in self.left if self.told.get(other.key) not in (None, "running")
        )
        self.line(
            f"{self.place(cell.key)}: {state['state']}{took}{error}",
            0 if state["state"] == "interrupted" else done,
        )


def phase(step: int, steps: int) -> str:
    """What a cell does that is not at its steps."""
    return "evaluating" if step >= steps else "" if step else "starting"


def shortened(key: str, width: int = 40) -> str:
    """Its end stays: the seed."""
    return key if len(key) <= width else f"{key[: width // 2 - 1]}…{key[-width // 2 :]}"
