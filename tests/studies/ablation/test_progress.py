"""What a log, which has no bars, is told of an ablation."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from owlfuse.studies.ablation import progress


@pytest.fixture
def view(tmp_path):
    """Of two cells of 20 steps, the first of which runs."""
    cells = [SimpleNamespace(key=f"plain-seed{seed}", steps=20) for seed in (0, 1)]
    view = progress.View(tmp_path, cells, cells, jobs=1)
    write(tmp_path / "plain-seed0", state="running")
    view.live = False
    view.began -= 60
    return view


def write(run: Path, step=None, **state):
    run.mkdir(exist_ok=True)
    if step is not None:
        (run / "progress.json").write_text(json.dumps({"step": step}))
    if state:
        (run / "cell.json").write_text(json.dumps({"began": time.time(), **state}))


def test_a_log_is_told_after_some_minutes_of_silence_how_far_a_cell_is_and_how_long_it_takes(
    view, monkeypatch, capsys
):
    view.update()
    view.update()
    assert capsys.readouterr().out == "1/2 plain-seed0: began, 20 steps\n"
    monkeypatch.setattr(progress, "QUIET", 0.0)
    view.update()
    assert capsys.readouterr().out == "1/2 plain-seed0: starting\n"
    write(view.folder / "plain-seed0", step=10)
    view.update()
    # a minute for 10 of 40
    assert capsys.readouterr().out == "1/2 plain-seed0: step 10 of 20; about 3 min left\n"
    write(view.folder / "plain-seed0", step=20)
    view.update()
    assert capsys.readouterr().out == "1/2 plain-seed0: evaluating; about 1 min left\n"


def test_a_cell_that_has_ended_is_told_at_once_and_once(view, capsys):
    view.update()
    capsys.readouterr()
    write(view.folder / "plain-seed0", state="finished", ended=time.time() + 20)
    view.update()
    view.update()
    assert capsys.readouterr().out == "1/2 plain-seed0: finished in 20 s; about 1 min left\n"
