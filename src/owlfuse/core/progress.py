"""How far a command is: a bar on a terminal, and elsewhere a plain line every so often."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from owlfuse.core.terminal import visible

T = TypeVar("T")
Clock = Callable[[], float]

FIRST_LINE = 30.0
"""Seconds until the first line of a log, and the least between two."""
LONGEST_SILENCE = 600.0
"""Seconds between two lines of the log of a long run."""
REDRAW = 0.5
"""Seconds between two pictures of a bar: the loss is read from the device for each."""
WINDOW = 100
"""Steps that a pace is of."""
BLOCKS = 5

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def progress_hidden(hidden: bool = True) -> Iterator[None]:
    """Inside, nothing says how far it is, as with `trainer.enable_progress_bar=false`."""
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


def on_terminal() -> bool:
    """Whether a bar can be redrawn where messages go. FORCE_COLOR makes no terminal of a file."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Pace:
    """How long a step took of late.

    The last steps are cut into blocks, and the pace is the median of the blocks' means: a slow step
    (compilation, the start of workers, a file system that hung) is in one block only, and workers
    that deliver in bursts are averaged inside each block.
    """

    def __init__(self) -> None:
        self.steps: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self.seen = 0

    def add(self, seconds: float, steps: int = 1) -> None:
        """Notes how long so many steps took.

        The first call is left out: it holds compilation and the start of workers.
        """
        self.seen += 1
        if self.seen > 1 and steps > 0:
            self.steps.append((seconds, steps))

    def seconds(self) -> float | None:
        """Of one step; None until it is known."""
        if not self.steps:
            return None
        size = max(1, len(self.steps) // BLOCKS)
        latest = list(self.steps)
        blocks = [latest[max(0, stop - size) : stop] for stop in range(len(latest), 0, -size)][
            :BLOCKS
        ]
        means = [
            sum(seconds for seconds, _ in block) / sum(steps for _, steps in block)
            for block in blocks
        ]
        return statistics.median_low(means)


class Progress:
    """Says how far something is, as a context manager. On a terminal it draws a bar, which what is
    printed meanwhile stands above. Elsewhere it prints a line after 30 s, and then one whenever a
    twentieth of the time until then has passed, at least every ten minutes.

    Args:
        title: what is done.
        total: how many steps there are.
        start: how many are done already.
        shown: False says nothing, as on other ranks than the first.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        shown: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        self.title = title
        self.total = total
        self.done = start
        self.pace = Pace()
        self.clock = clock
        self.shown = shown and not _hidden.get()
        self.live: Any = None
        self.began = self.last = self.drawn = self.line_at = clock()

    def __enter__(self) -> Progress:
        self.began = self.last = self.line_at = self.clock()
        if self.shown and on_terminal():
            self.live = live_bar()
            self.task = self.live.add_task(self.text(), total=self.total, completed=self.done)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bar away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def advance(self, steps: int = 1) -> None:
        """So many steps more are done."""
        now = self.clock()
        self.pace.add(now - self.last, steps)
        self.last = now
        self.done += steps
        if self.due():
            self.show()

    def due(self) -> bool:
        """Whether it is time to say how far it is."""
        if not self.shown:
            return False
        now = self.clock()
        if self.live is not None:
            return now - self.drawn >= REDRAW or self.done >= self.total
        silence = max(FIRST_LINE, min((now - self.began) / 20, LONGEST_SILENCE))
        return now - self.line_at >= silence

    def show(self, note: str = "") -> None:
        """Redraws the bar, or prints a line.

        Args:
            note: what is said behind the count; else the time left.
        """
        if self.live is not None:
            self.drawn = self.clock()
            self.live.update(
                self.task, completed=self.done, description=self.text(note), refresh=True
            )
        elif self.shown:
            self.say(self.text(note))

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self.shown:
            self.line_at = self.clock()
            print(line, file=sys.stderr, flush=True)

    def text(self, note: str = "") -> str:
        """How far it is."""
        left = self.seconds_left()
        note = note or (f"about {duration(left)} left" if left else "")
        return visible(
            f"{self.title}: {self.done:,} of {self.total:,}" + (f", {note}" if note else "")
        )

    def seconds_left(self) -> float | None:
        """For the steps that are left; None where the pace is not known."""
        pace = self.pace.seconds()
        return None if pace is None else pace * max(0, self.total - self.done)


def live_bar() -> Any:
    """A bar that redraws when it is told to: a thread that drew it could hold a lock while data
    workers are forked."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    text = TextColumn(
        "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
    )
    return Bars(
        BarColumn(10), text, console=Console(stderr=True), auto_refresh=False, transient=True
    )


def track(items: Iterable[T], title: str, total: int, shown: bool = True) -> Iterator[T]:
    """Yields the items, and says how far it is."""
    with Progress(title, total, shown=shown) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """95 -> 2 min, 30 -> 30 s, 9000 -> 2.5 h, 300000 -> 3.5 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""Their warnings stay.

What is below a warning tells which accelerators there are, advertises, and repeats the commands.
"""
MESSAGES = (
    # data.workers is the user's choice, and the step time shows what it costs
    r"The '.*' does not have many workers",
    # a run is one epoch, so that its workers live as long
    r"Consider setting `persistent_workers=True`",
    # two loggers write into the run's folder
    r"Experiment logs directory .* exists and is not empty",
    # those of a run that goes on
    r"Checkpoint directory .* exists and is not empty",
    # the sampler goes on where it was
    r"You're resuming from a checkpoint that ended before the epoch ended",
)
"""Beginnings of Lightning's warnings about what owlfuse does on purpose."""
LIBRARIES = (
    r"(lightning|torch|torchvision|transformers|huggingface_hub|peft|timm|accelerate|hydra"
    r"|omegaconf)\b"
)
"""Whose calls of what will be no more are for their makers to change."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, libraries neither advertise nor tell of what a user cannot change; what a user can
    act on they say as ever. Lines come in the order in which they were printed where output goes
    into a file, too. It decorates the functions behind the commands."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    with warnings.catch_warnings():
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message, UserWarning)
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", "", category, LIBRARIES)
        for logger in loggers:
            logger.setLevel(max(logging.WARNING, logger.level))
        if bars:
            hide_weight_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()


def hide_weight_bars() -> None:
    """No bars of weights that are read from or written to the disk. Those of downloads, which take
    minutes, stay: transformers can only turn off both."""
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    utils.enable_progress_bars()
