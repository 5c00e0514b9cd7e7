"""Handlers of signals for the time of a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Handler = Callable[[int, Any], Any] | int | None


@contextmanager
def signals_handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Handle signals by functions until the block ends, and then as before.

    Outside of the main thread, in which alone Python allows handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_end_the_run() -> Iterator[None]:
    """Make SIGTERM do what Ctrl-C does: it raises KeyboardInterrupt, and the run ends with a line.

    During the steps see `callbacks.StopOnSignal`. Afterwards both signals, and SIGCHLD, have their
    former handlers: Lightning and torch leave some of theirs.
    """
    handlers: dict[int, Handler] = {signal.SIGTERM: interrupt}
    for number in (signal.SIGINT, signal.SIGCHLD):
        # Set to what they are already, so that they are put back at the end.
        handlers[number] = signal.getsignal(number)
    with signals_handled(handlers):
        yield


def interrupt(number: int, frame: Any) -> None:
    """Handle a signal as Ctrl-C."""
    raise KeyboardInterrupt
