"""Signals that end a run as Ctrl-C does."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from owlfuse.core.signals import ending_signals, signals_handled

WAIT = """
import pathlib, signal, sys, time
# The tests themselves may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from owlfuse.core.signals import signals_end_the_run
try:
    with signals_end_the_run():
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped", flush=True)
    pathlib.Path(sys.argv[1]).write_text("a checkpoint")
"""


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_as_ctrl_c_does(tmp_path):
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", WAIT, str(tmp_path / "written")]
    with subprocess.Popen(command, preexec_fn=lambda: os.login_tty(end)) as process:
        os.close(end)
        assert os.read(terminal, 100).strip() == b"ready"
        os.close(terminal)
        assert process.wait(120) == 0
    assert (tmp_path / "written").read_text() == "a checkpoint"


def test_a_closed_terminal_is_ignored_under_nohup():
    with signals_handled({signal.SIGHUP: signal.SIG_IGN}):
        assert ending_signals() == [signal.SIGTERM]
    with signals_handled({signal.SIGHUP: signal.SIG_DFL}):
        assert ending_signals() == [signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("job", [None, "17"])
def test_the_signal_of_a_clusters_job_ends_a_run_too(job, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    assert (signal.SIGUSR1 in ending_signals()) == bool(job)
