"""The handler of SIGTERM outside of a training's steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_end_the_run() -> Iterator[None]:
    """Make SIGTERM do what Ctrl-C does: it raises KeyboardInterrupt, and the run ends with a line.

    During the steps see `callbacks.StopOnSignal`. Afterwards both signals, and SIGCHLD, have their
    former handlers: Lightning and torch leave some of theirs.
    """
    # Python allows handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        before[number] = signal.getsignal(number)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: Any) -> None:
    """Handle a signal as Ctrl-C."""
    raise KeyboardInterrupt
