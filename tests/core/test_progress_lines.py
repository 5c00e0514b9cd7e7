"""How far a command is, with a clock that is set by hand: estimates, lines of a log, and bars on
a terminal."""

import logging
import os
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from owlfuse.core import progress
from owlfuse.core.progress import Pace, Progress, progress_hidden, quiet_libraries, tell, track
from owlfuse.training.callbacks import TrainingProgress


class FakeClock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return FakeClock()


def bursts(step):
    """Eight workers that deliver at once, every eighth step: 0.5 s a step on average."""
    return 4.0 if step % 8 == 0 else 0.0


PATTERNS = {
    "even": lambda step: 0.5,
    "the first step compiles": lambda step: 120.0 if step == 0 else 0.5,
    "three steps compile": lambda step: 60.0 if step < 3 else 0.5,
    "workers deliver in bursts": bursts,
    "one step hangs": lambda step: 90.0 if step == 57 else 0.5,
    "the first half was slow": lambda step: 5.0 if step < 100 else 0.5,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pace_is_that_of_the_steps_to_come(pattern):
    pace = Pace()
    for step in range(200):
        pace.add(PATTERNS[pattern](step))
        if step in (40, 60) and pattern != "the first half was slow":
            assert 0.25 < pace.seconds() < 1.0, step
    assert 0.25 < pace.seconds() < 1.0


def test_there_is_no_pace_before_the_second_step():
    pace = Pace()
    assert pace.seconds() is None
    pace.add(60.0)
    assert pace.seconds() is None
    pace.add(1.0)
    assert pace.seconds() == 1.0


def test_steps_that_come_many_at_a_time_are_each_counted(clock):
    counted = Progress("counting", 1000, clock=clock)
    with counted:
        for _ in range(5):
            clock.now += 2.0
            counted.advance(100)
        assert counted.seconds_left() == pytest.approx(10.0)


@pytest.mark.parametrize(("seconds", "most"), [(20, 0), (3600, 80), (3 * 86400, 700)])
def test_a_log_gets_lines_by_time_whatever_the_number_of_steps(seconds, most, clock, capsys):
    with Progress("counting", 20_000, clock=clock) as counted:
        for _ in range(20_000):
            clock.now += seconds / 20_000
            counted.advance()
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert min(20, most) <= len(lines) <= most
    assert not any("\r" in line or "\x1b" in line for line in lines)
    for line in lines:
        assert re.fullmatch(r"counting: [\d,]+ of 20,000, about [\d.]+ (s|min|h|days) left", line)


def test_nothing_is_said_of_what_is_not_shown(clock, capsys):
    for hidden, shown in ((True, True), (False, False)):
        with progress_hidden(hidden), Progress("counting", 10, shown=shown, clock=clock) as counted:
            clock.now += 100
            counted.advance()
            counted.say("a line")
    with progress_hidden():
        assert list(track(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_bar_and_its_cursor_back(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws, although pytest captures
    monkeypatch.setenv("TERM", "xterm")
    before = sys.stderr

    def interrupted():
        with Progress("counting", 10, clock=clock) as counted:
            clock.now += 1
            counted.advance()
            print("a warning", file=sys.stderr)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is before
    written = capsys.readouterr().err
    assert "a warning\n" in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") > -1


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_redirected_log_is_no_terminal_whatever_the_environment_says(
    variable, monkeypatch, clock, capsys
):
    monkeypatch.setenv(variable, "1")
    with Progress("counting", 10, clock=clock) as counted:
        clock.now += 100
        counted.advance()
    assert capsys.readouterr().err == "counting: 1 of 10\n"


# Training


def trainer(steps, every, accumulate=1):
    return SimpleNamespace(
        global_step=0,
        max_steps=steps,
        is_global_zero=True,
        accumulate_grad_batches=accumulate,
        val_check_interval=every * accumulate,
        callback_metrics={"train/loss": torch.tensor(1.5), "val/loss": torch.tensor(2.0)},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1e-3}, {"lr": 2e-4}])],
        datamodule=SimpleNamespace(global_batch_size=8, validation={"val": None}),
    )


def simulate(callback, run, clock, step_seconds, validation_seconds, checkpoint_seconds=0.0):
    """Yields after each optimizer step."""
    batch = 0
    for step in range(run.max_steps):
        for part in range(run.accumulate_grad_batches):
            callback.on_train_batch_start(run, None, None, batch)
            clock.now += step_seconds(step) / run.accumulate_grad_batches
            if part == run.accumulate_grad_batches - 1:
                run.global_step = step + 1
            callback.on_train_batch_end(run, None, None, None, batch)
            batch += 1
        yield step + 1
        if batch % run.val_check_interval == 0:
            callback.on_validation_start(run, None)
            clock.now += validation_seconds
            callback.on_validation_end(run, None)
            clock.now += checkpoint_seconds
    callback.on_train_end(run, None)


def seconds_said(text):
    number, unit = re.search(r"about ([\d.]+) (s|min|h|days) left", text).groups()
    return float(number) * {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "pattern",
    ["even", "the first step compiles", "three steps compile", "workers deliver in bursts"],
)
def test_the_time_left_is_within_a_factor_of_two(pattern, accumulate, clock, capsys):
    run, callback = trainer(400, every=100, accumulate=accumulate), TrainingProgress(clock)
    said = {}
    for step in simulate(
        callback, run, clock, PATTERNS[pattern], validation_seconds=80.0, checkpoint_seconds=20.0
    ):
        if step in (30, 99, 150, 250, 320):
            said[step] = callback.time_left(run), clock.now
    training = {step: sum(PATTERNS[pattern](later) for later in range(step, 400)) for step in said}
    for step, (text, _) in said.items():
        known = step > 100
        to_come = 4 - step // 100
        actual = training[step] + (to_come * 100.0 if known else 0.0)
        assert actual / 2 < seconds_said(text) < actual * 2, (step, text, actual)
        assert text.endswith(
            "left without evaluation" if known else "left without validations and evaluation"
        )
    lines = capsys.readouterr().err.split("\n")
    assert any(
        re.match(
            r"steps: [\d]+ of 400, loss 1.5, about .*, [\d.]+ samples/s, learning rate 0.001", line
        )
        for line in lines
    )
    assert lines.count("step 100 of 400: val/loss 2") == 1
    assert lines[-2].startswith("trained 400 steps in ")


def test_without_the_bar_there_are_a_start_and_an_end(clock, capsys):
    run, callback = trainer(100, every=10), TrainingProgress(clock)
    with progress_hidden():
        for _ in simulate(callback, run, clock, PATTERNS["even"], validation_seconds=80.0):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trained 100 steps")


# Libraries


def test_what_a_user_cannot_change_is_not_said_and_all_else_is():
    logger = logging.getLogger("lightning.pytorch")
    level, filters = logger.level, list(warnings.filters)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet_libraries():
            assert logger.level >= logging.WARNING
            warnings.warn(
                "The 'train_dataloader' does not have many workers which may be a bottleneck",
                UserWarning,
                stacklevel=1,
            )
            warnings.warn_explicit(
                "`LeafSpec` is deprecated",
                FutureWarning,
                "x.py",
                1,
                "lightning.pytorch.utilities._pytree",
            )
            warnings.warn("GPU available but not used", UserWarning, stacklevel=1)
            warnings.warn_explicit(
                "yours is old", FutureWarning, "y.py", 1, "lightning_extension_of_mine"
            )
    assert [str(warning.message) for warning in heard] == [
        "GPU available but not used",
        "yours is old",
    ]
    assert logger.level == level
    assert warnings.filters == filters


def test_whoever_has_closed_the_standard_error_ends_no_training(monkeypatch):
    """As a `tee` that Ctrl-C has ended."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        tell("stopping after this step")
        # what is left in the buffer would raise again when it is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)
