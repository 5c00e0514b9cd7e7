"""The processes that load data: which signals they answer, and how they ended."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any


class DataWorkers:
    """Starts the processes of a DataLoader and knows how each has ended.

    A signal to the process group (Ctrl-C, `timeout`, systemd, SLURM) reaches the workers too. It is
    the training process's to answer: its workers load on until it has written its checkpoint, and
    it ends them itself.
    """

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self.told_to_end: set[int | None] = set()
        context: Any = multiprocessing.get_context()
        context = type(context)()  # its own instance, which may be changed
        self.start_process = context.Process
        context.Process = self.process
        self.context: BaseContext = context
        """For the argument `multiprocessing_context` of a DataLoader."""
        self.pid = os.getpid()
        # before multiprocessing's own end, which sends SIGTERM and waits for them
        atexit.register(self.end_all)

    def __reduce__(self) -> Any:
        """A worker that is spawned gets the data with none of the processes."""
        return DataWorkers, ()

    def process(self, *arguments: Any, **keywords: Any) -> BaseProcess:
        """A process that `terminate`, a SIGTERM for others, ends although it ignores that
        signal."""
        process = self.start_process(*arguments, **keywords)
        process.terminate = partial(self.end, process)
        self.processes.append(process)
        return process

    def end(self, process: BaseProcess) -> None:
        """Ends a process that does not end by being asked through its queue."""
        self.told_to_end.add(process.pid)
        process.kill()

    def end_all(self) -> None:
        """Ends the processes that are left when this one ends."""
        for process in self.processes if os.getpid() == self.pid else ():
            if process.is_alive():
                self.end(process)

    def failure(self) -> str | None:
        """How a worker ended by itself, in words; None where all run or ended as they were told
        to."""
        for process in self.processes:
            code = process.exitcode
            if code and process.pid not in self.told_to_end:
                how = (
                    f"was ended by signal {signal.Signals(-code).name}"
                    if code < 0
                    else f"ended with exit code {code}"
                )
                why = (
                    ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
                )
                return f"data worker {process.pid} {how}{why}"
        return None


def ignore_signals(worker: int) -> None:
    """What a DataLoader's worker begins with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
