"""The processes that load data: the signals they ignore, and how they ended."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from owlfuse.core.errors import DataError


class DataWorkers:
    """Starts the processes of a DataLoader and knows how each has ended.

    A signal to the process group (Ctrl-C, `timeout`, systemd, SLURM) reaches the workers too, and
    they ignore it: they load on until the training process has written its checkpoint, which then
    ends them.
    """

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self.killed: set[int | None] = set()
        context: Any = multiprocessing.get_context()
        context = type(context)()  # a new one, since the global one must not be changed
        self.start_process = context.Process
        context.Process = self.process
        self.context: BaseContext = context
        """For the argument `multiprocessing_context` of a DataLoader."""
        # A forked worker inherits the exit handler, and must not kill its siblings.
        self.pid = os.getpid()
        # before multiprocessing's own end, which sends SIGTERM and waits for them
        atexit.register(self.kill_all)

    def __reduce__(self) -> Any:
        """A worker that is spawned gets the data with none of the processes."""
        return DataWorkers, ()

    def process(self, *arguments: Any, **keywords: Any) -> BaseProcess:
        """Return a process whose `terminate` kills it, since it ignores the usual SIGTERM."""
        process = self.start_process(*arguments, **keywords)
        process.terminate = partial(self.kill, process)
        self.processes.append(process)
        return process

    def kill(self, process: BaseProcess) -> None:
        """Kill a process that did not end when its queue closed."""
        # before it dies, so that its exit code is never taken for a failure of its own
        self.killed.add(process.pid)
        process.kill()

    def kill_all(self) -> None:
        """Kill the processes that still run when this one ends."""
        if os.getpid() != self.pid:
            return
        for process in self.processes:
            if process.is_alive():
                self.kill(process)

    def failure(self) -> str | None:
        """Return a sentence about a worker that ended by itself; None where all run or were
        killed here."""
        for process in self.processes:
            code = process.exitcode
            if not code or process.pid in self.killed:
                continue
            if code == -signal.SIGKILL:
                return (
                    f"data worker {process.pid} was ended by signal SIGKILL, as the system does "
                    "where memory runs out"
                )
            if code < 0:
                name = signal.Signals(-code).name
                return f"data worker {process.pid} was ended by signal {name}"
            return f"data worker {process.pid} ended with exit code {code}"
        return None

    @contextmanager
    def failures_told(self, advice: str) -> Iterator[None]:
        """Raise DataError, inside, in the place of the RuntimeError that torch makes of a worker
        that ended by itself.

        Args:
            advice: what to do, the end of the message.
        """
        try:
            yield
        except RuntimeError as error:
            failure = self.failure()
            if failure is None:
                raise
            raise DataError(f"{failure}; {advice}") from error


def ignore_signals(worker: int) -> None:
    """Set up a DataLoader's worker process: it ignores Ctrl-C and the signals that end a run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
