"""Handlers of signals for the time of a block."""

from __future__ import annotations

import errno
import os
import signal
import termios
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
    """Make the signals of `ending_signals` do what Ctrl-C does: it raises KeyboardInterrupt, and
    the run ends with a line.

    During the steps see `callbacks.StopOnSignal`. Afterwards these signals, Ctrl-C and SIGCHLD have
    their former handlers: Lightning and torch leave some of theirs.
    """
    handlers: dict[int, Handler] = dict.fromkeys(ending_signals(), interrupt)
    for number in (signal.SIGINT, signal.SIGCHLD):
        # Set to what they are already, so that they are put back at the end.
        handlers[number] = signal.getsignal(number)
    with signals_handled(handlers):
        yield


def interrupt(number: int, frame: Any) -> None:
    """Handle a signal as Ctrl-C."""
    leave_closed_terminal()
    raise KeyboardInterrupt


def ending_signals() -> list[int]:
    """Return SIGTERM, SIGHUP of a terminal that is closed, where it is not ignored, as nohup has
    it, and in a job of SLURM the SIGUSR1 that is usual for `--signal`."""
    signals: list[int] = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    if "SLURM_JOB_ID" in os.environ:
        signals.append(signal.SIGUSR1)
    return signals


def leave_closed_terminal() -> None:
    """Let output go nowhere whose terminal has been closed: writing there would be an error."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
