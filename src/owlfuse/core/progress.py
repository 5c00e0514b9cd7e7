"""Progress of a command: a bar on a terminal, and elsewhere a plain line from time to time."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from owlfuse.core.terminal import visible

T = TypeVar("T")
Clock = Callable[[], float]

# Seconds until the first line of a log, and the least between two.
MIN_INTERVAL = 30.0
# Seconds between two lines of the log of a long run.
MAX_INTERVAL = 600.0
# Seconds between two states of a bar: the loss is read from the device for each.
REDRAW_INTERVAL = 0.5
# Steps in the average of a pace.
WINDOW = 100
BLOCKS = 5

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def progress_hidden(hidden: bool = True) -> Iterator[None]:
    """Hide progress inside, as with `trainer.enable_progress_bar=false`."""
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


def on_terminal() -> bool:
    """Whether a bar can be redrawn where messages go. FORCE_COLOR makes no terminal of a file."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Pace:
    """The mean time of the last steps.

    The last steps are cut into blocks, and the pace is the median of the blocks' means: a slow step
    (compilation, the start of workers, a file system that hung) is in one block only, and workers
    that deliver in bursts are averaged inside each block.
    """

    def __init__(self) -> None:
        self.steps: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self.calls = 0

    def add(self, seconds: float, steps: int = 1) -> None:
        """Add the time of some steps.

        The first call is left out: it includes compilation and the start of workers.
        """
        self.calls += 1
        if self.calls > 1 and steps > 0:
            self.steps.append((seconds, steps))

    def seconds(self) -> float | None:
        """Return the seconds of one step; None until they are known."""
        if not self.steps:
            return None
        latest = list(self.steps)
        size = max(1, len(latest) // BLOCKS)
        means = []
        for stop in list(range(len(latest), 0, -size))[:BLOCKS]:
            block = latest[max(0, stop - size) : stop]
            total_seconds = sum(seconds for seconds, _ in block)
            means.append(total_seconds / sum(steps for _, steps in block))
        # The median ignores one block with a pause, where a mean would not.
        return statistics.median_low(means)


class Progress:
    """Shows progress, as a context manager. On a terminal it draws a bar, below all that is printed
    meanwhile. Elsewhere it prints a line after 30 s, and then one whenever a twentieth of the time
    until then has passed, at least every ten minutes.

    Args:
        title: of the work.
        total: number of steps.
        start: number of steps that are done already.
        shown: False shows nothing, as on other ranks than the first.
        clock: a monotonic clock, in seconds.
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
        # Again at entry: between construction and the first step there may be minutes.
        self.began = self.last = self.line_at = self.clock()
        if self.shown and on_terminal():
            self.live = live_bar()
            self.task = self.live.add_task(self.text(), total=self.total, completed=self.done)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the bar."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def advance(self, steps: int = 1) -> None:
        """Add finished steps."""
        now = self.clock()
        self.pace.add(now - self.last, steps)
        self.last = now
        self.done += steps
        if self.due():
            self.show()

    def due(self) -> bool:
        """Whether it is time to show the progress."""
        if not self.shown:
            return False
        now = self.clock()
        if self.live is not None:
            # The last step is always drawn, so that a bar ends full.
            return now - self.drawn >= REDRAW_INTERVAL or self.done >= self.total
        silence = max(MIN_INTERVAL, min((now - self.began) / 20, MAX_INTERVAL))
        return now - self.line_at >= silence

    def show(self, note: str = "") -> None:
        """Redraw the bar, or print a line.

        Args:
            note: a text behind the count, instead of the remaining time.
        """
        if self.live is not None:
            self.drawn = self.clock()
            self.live.update(
                self.task,
                completed=self.done,
                description=self.text(note),
                refresh=True,
            )
        elif self.shown:
            self.say(self.text(note))

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.shown:
            self.line_at = self.clock()
            tell(line)

    def text(self, note: str = "") -> str:
        """Return the title, the count and the remaining time."""
        seconds = self.seconds_left()
        if not note and seconds:
            note = f"about {duration(seconds)} left"
        count = f"{self.title}: {self.done:,} of {self.total:,}"
        return visible(f"{count}, {note}" if note else count)

    def seconds_left(self) -> float | None:
        """Return the seconds of the remaining steps; None where the pace is not known."""
        pace = self.pace.seconds()
        return None if pace is None else pace * max(0, self.total - self.done)


def tell(line: str) -> None:
    """Print a line to the standard error. Who has closed it, as a `tee` that Ctrl-C ends too, must
    not end a training."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def live_bar() -> Any:
    """Return a bar without a thread: one that redraws it could hold a lock while data workers are
    forked."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    column = Column(no_wrap=True, overflow="ellipsis")
    text = TextColumn("{task.description}", markup=False, table_column=column)
    console = Console(stderr=True)
    return Bars(BarColumn(10), text, console=console, auto_refresh=False, transient=True)


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yield the items, and show the progress."""
    with Progress(title, total) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """Return seconds in words: 30 as 30 s, 95 as 2 min, 9000 as 2.5 h, 300000 as 3.5 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


# Loggers whose warnings stay. Their lines below warnings list accelerators, advertise, and repeat
# commands.
LOGGERS = ("lightning.pytorch", "lightning.fabric")
# Beginnings of Lightning's warnings about what owlfuse does on purpose.
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
# Libraries whose own deprecation warnings are hidden.
LIBRARIES = (
    r"(lightning|torch|torchvision|transformers|huggingface_hub|peft|timm|accelerate|hydra"
    r"|omegaconf)\b"
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide, inside, the advertisements of libraries and warnings that a user cannot act on.

    Lines come in the order in which they were printed where output goes into a file, too. It
    decorates the functions behind the commands.
    """
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    # A notebook has an output without it.
    if hasattr(sys.stdout, "reconfigure"):
        # A file is buffered in blocks otherwise, and its lines come behind those of stderr.
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
    """Hide bars of weights that are read or written, and no bars of downloads, which take minutes:
    transformers can only turn off both."""
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    utils.enable_progress_bars()
