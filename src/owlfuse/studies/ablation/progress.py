"""What a terminal shows of an ablation: the plan before it, and how far each cell is.

Without a terminal, plain lines.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.console import count
from owlfuse.core.files import read_json_if_there
from owlfuse.core.progress import duration
from owlfuse.core.terminal import cell as table_cell
from owlfuse.studies.ablation.file import Ablation
from owlfuse.studies.ablation.grid import Cell
from owlfuse.studies.ablation.launch import STATE_FILE

WIDTH = 100
"""Columns that all tables fit into."""
QUIET_SECONDS = 300.0
"""Silence after which a log, which has no bars, gets a line for each running cell."""


def console() -> Console:
    """Return a console at most WIDTH columns wide."""
    # rich takes 80 columns where there is no terminal.
    return Console(width=min(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH)


def print_plan(
    ablation: Ablation,
    folder: Path,
    cells: list[Cell],
    unfinished: list[Cell],
    jobs: int,
) -> None:
    """Prints the cells with parameters trained and steps, what is finished, and an estimate of the
    time."""
    out = console()
    out.print(Text.assemble((ablation.name, "bold"), f": {ablation.question}"), highlight=False)
    table = Table()
    for column in ("cell", "seeds", "trained, about", "steps", "finished"):
        table.add_column(column, justify="left" if column == "cell" else "right", overflow="fold")
    # The seeds of a cell stand together.
    for name, same_cells in itertools.groupby(cells, key=lambda cell: cell.name):
        runs = list(same_cells)
        finished = sum(cell not in unfinished for cell in runs)
        table.add_row(
            name,
            ",".join(str(cell.seed) for cell in runs),
            count(runs[0].trained),
            f"{runs[0].steps:,}",
            f"{finished} of {len(runs)}",
        )
    out.print(table)
    seconds = seconds_per_step(folder, cells)
    out.print(estimate(ablation, cells, unfinished, seconds, jobs), highlight=False)


def estimate(
    ablation: Ablation,
    cells: list[Cell],
    unfinished: list[Cell],
    seconds: float | None,
    jobs: int,
) -> str:
    """Return a line on what is left to do, with the time where `seconds` per step are known."""
    steps = sum(cell.steps for cell in unfinished)
    line = f"{len(unfinished)} of {len(cells)} runs are left, {steps:,} steps"
    if unfinished and seconds:
        line += f", about {duration(steps * seconds / jobs)} by the finished runs"
    elif unfinished:
        line += "; how long they take shows with the first"
    if ablation.minutes:
        line += f"; none is begun after {ablation.minutes:g} min"
    if ablation.steps:
        line += f"; at most {ablation.steps:,} steps are begun"
    return line


def seconds_per_step(folder: Path, cells: list[Cell]) -> float | None:
    """Return the mean over runs, with all that a run does beside its steps: finished runs of this
    ablation, else those of the same experiment that were trained alone."""
    rates = []
    for cell in cells:
        state = read_json_if_there(folder / cell.key / STATE_FILE)
        if state.get("state") == "finished":
            # the time is of the last attempt
            steps = max(1, cell.steps - state.get("first_step", 0))
            rates.append((state["ended"] - state["began"]) / steps)
    base = cells[0].words[0].partition("=")[2]  # the first override is experiment=<base>
    if not rates and base:
        for path in (folder.parent / base).glob("*/results.json"):
            results = read_json_if_there(path)
            if results.get("steps"):
                rates.append(results["wall_s"] / results["steps"])
    return sum(rates) / len(rates) if rates else None


@contextmanager
def show_progress(folder: Path, cells: list[Cell]) -> Iterator[None]:
    """Watches the files of cells that are to be trained, in a thread until the block ends."""
    view = View(folder, cells)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            view.update()
        view.update()  # what has changed since the last look

    thread = threading.Thread(target=watch, daemon=True)
    with view.progress:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class View:
    """A bar for all cells and one for each running cell; a line stays for each that has ended.

    Args:
        cells: those that are to be trained.
    """

    def __init__(self, folder: Path, cells: list[Cell]) -> None:
        self.folder = folder
        self.cells = cells
        self.began = self.last_line = time.time()
        self.live = sys.stdout.isatty()
        self.console = console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            disable=not self.live,  # a log gets lines instead
            transient=True,
        )
        self.total_steps = sum(cell.steps for cell in cells)
        self.total_bar = self.progress.add_task(
            f"{len(cells)} runs", total=self.total_steps, detail=""
        )
        self.bars: dict[str, TaskID] = {}
        self.states: dict[str, str] = {}

    def update(self) -> None:
        """Reads the states and shows what is new."""
        # Files are read again and again: tasks may run on other machines.
        steps_done = 0
        running: dict[str, tuple[int, int]] = {}
        for cell in self.cells:
            run = self.folder / cell.key
            state = read_json_if_there(run / STATE_FILE)
            if state.get("began", 0) < self.began:
                continue  # an earlier command wrote it
            if state["state"] == "running":
                step = read_json_if_there(run / "progress.json").get("step", 0)
                running[cell.key] = step, cell.steps
                steps_done += step
            else:
                steps_done += cell.steps  # nothing of it is left to do
            if self.states.get(cell.key) != state["state"]:
                self.states[cell.key] = state["state"]
                self.print_state(cell, state)
        if self.live:
            self.update_bars(steps_done, running)
        elif running and time.time() - self.last_line >= QUIET_SECONDS:
            for key, (step, steps) in running.items():
                progress = phase(step, steps) or f"step {step:,} of {steps:,}"
                self.print_line(f"{self.label(key)}: {progress}", steps_done)

    def print_line(self, text: str, steps_done: int) -> None:
        """Prints a line, with the time that is left where anything is."""
        time_left = self.time_left(steps_done) if steps_done < self.total_steps else ""
        line = f"{text}; {time_left}" if time_left else text
        self.console.print(line, highlight=False, markup=False)
        self.last_line = time.time()

    def label(self, key: str) -> str:
        """Return which of the cells it is: `1/4 owl3-seed0`."""
        index = [cell.key for cell in self.cells].index(key)
        return f"{index + 1}/{len(self.cells)} {key}"

    def time_left(self, steps_done: int) -> str:
        """Return the time for all cells at the pace until now; empty before the first step."""
        if not steps_done:
            return ""  # there is no pace yet
        seconds = time.time() - self.began
        return f"about {duration(seconds * (self.total_steps - steps_done) / steps_done)} left"

    def update_bars(self, steps_done: int, running: dict[str, tuple[int, int]]) -> None:
        """Moves the bars, and removes those of cells that have ended."""
        self.progress.update(
            self.total_bar, completed=steps_done, detail=self.time_left(steps_done)
        )
        for key, (step, steps) in running.items():
            if key not in self.bars:
                # A level of the user's may hold square brackets, which rich would take for markup.
                self.bars[key] = self.progress.add_task(
                    table_cell(f"  {shortened(key)}"), total=steps, detail=""
                )
            self.progress.update(self.bars[key], completed=step, detail=phase(step, steps))
        for key in self.bars.keys() - running.keys():
            self.progress.remove_task(self.bars.pop(key))

    def print_state(self, cell: Cell, state: dict[str, Any]) -> None:
        """Prints a line when a cell begins (where there are no bars) and when it has ended."""
        label = self.label(cell.key)
        if state["state"] == "running":
            if not self.live:
                self.print_line(f"{label}: began, {cell.steps:,} steps", 0)
            return
        line = f"{label}: {state['state']}"
        if "ended" in state:
            line += f" in {duration(state['ended'] - state['began'])}"
        if state.get("error"):
            line += f": {state['error']}"
        # Of an interrupted command there is no time left to tell.
        steps_done = 0
        if state["state"] != "interrupted":
            for ended in self.cells:
                if self.states.get(ended.key, "running") != "running":
                    steps_done += ended.steps
        self.print_line(line, steps_done)


def phase(step: int, steps: int) -> str:
    """Return what a cell does that is not at its steps; empty for one that is."""
    if step >= steps:
        return "evaluating"
    return "" if step else "starting"


def shortened(key: str) -> str:
    """Return a cell's name, at most 40 characters of it: the middle is left out, since its end is
    the seed."""
    return key if len(key) <= 40 else f"{key[:19]}…{key[-20:]}"
