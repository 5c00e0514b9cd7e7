"""What SIGTERM does outside of a training's steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_end_the_run() -> Iterator[None]:
    """Before and after the steps SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt, and
    the run ends with a line. In the steps see `trainer.StopOnSignal`. Afterwards both signals, and
    SIGCHLD, do what they did before: Lightning and torch leave handlers of theirs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    }
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: Any) -> None:
    """A signal's handler that does what Ctrl-C does."""
    raise KeyboardInterrupt
