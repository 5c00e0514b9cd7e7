"""How cells are started, with a stand-in for the process that trains one."""

import errno
import fcntl
import json
import os
import threading
import time

import pytest
import torch

from owlfuse.core.errors import ConfigError
from owlfuse.studies.ablation import launch
from owlfuse.studies.ablation.run import run_lock

KEYS = ["a-seed0", "b-seed0", "c-seed0"]


@pytest.fixture
def folder(tmp_path):
    config = {"trainer": {"devices": 1}}
    cells = [{"key": key, "hash": {"code": "c0de"}, "config": config} for key in KEYS]
    (tmp_path / "ablation.json").write_text(json.dumps({"cells": cells}))
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The keys of cells in the order in which they began, with the most that ran at a time."""

    class Trained:
        def __init__(self):
            self.keys = []
            self.running = self.most = 0
            self.lock = threading.Lock()

        def __call__(self, folder, key, log, variables):
            with self.lock:
                self.keys.append((key, variables))
                self.running += 1
                self.most = max(self.most, self.running)
            time.sleep(0.3)
            log.write_text("owlfuse: error: no luck\n" if key.startswith("b") else "done\n")
            with self.lock:
                self.running -= 1
            return 1 if key.startswith("b") else 0

    stand_in = Trained()
    monkeypatch.setattr(launch, "train_in_process", stand_in)
    return stand_in


def state(folder, key):
    path = folder / key / "cell.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("jobs", [1, 2])
def test_cells_run_so_many_at_a_time_and_one_that_fails_does_not_end_the_others(
    folder, trained, jobs, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch.launch(folder, KEYS, "basic", jobs, [], None)
    assert sorted(key for key, _ in trained.keys) == KEYS
    assert trained.most == jobs
    assert all(("OMP_NUM_THREADS" in variables) == (jobs == 2) for _, variables in trained.keys)
    assert [state(folder, key)["state"] for key in KEYS] == ["finished", "failed", "finished"]
    assert state(folder, KEYS[1])["error"] == "no luck"
    assert state(folder, KEYS[1])["hash"] == {"code": "c0de"}


def test_cells_beside_each_other_have_gpus_of_their_own(folder, trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "machine", lambda: "a machine with two GPUs")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launch.launch(folder, KEYS, "basic", 2, [], None)
    first, second = (variables["CUDA_VISIBLE_DEVICES"] for _, variables in trained.keys[:2])
    assert sorted([first, second]) == ["0", "1"]


@pytest.mark.parametrize(
    ("gpus", "visible", "devices", "slot", "own"),
    [
        (8, None, 1, 5, "5"),
        (8, None, 2, 1, "2,3"),
        (4, "4,5,6,7", 1, 2, "6"),
        (2, None, 1, 3, "1"),  # more cells than GPUs share them
        (2, None, 4, 0, "0,1"),
        (8, None, "auto", 1, None),
        (1, None, 1, 1, None),
        (0, None, 1, 1, None),
    ],
)
def test_gpus_of_a_slot(gpus, visible, devices, slot, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.own_gpus(devices, slot).get("CUDA_VISIBLE_DEVICES") == own


def test_a_cell_is_one_task_of_a_cluster():
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=r"launcher.tasks_per_node=4: a cell is one task"):
        launch.check_launcher("submitit_slurm", ["tasks_per_node=4"])
    launch.check_launcher("submitit_slurm", ["tasks_per_node=1", "gpus_per_node=4"])


@pytest.mark.parametrize(
    ("code", "written", "error"),
    [
        (-9, "step 300 of 1,200", "ended by signal SIGKILL, as the system does where memory runs"),
        (-11, "a picture", "ended by signal SIGSEGV: a picture"),
        (1, "ValueError: no", "ValueError: no"),
        (1, "", "exit code 1"),
    ],
)
def test_a_failure_is_told_of_the_last_attempt(folder, monkeypatch, code, written, error):
    def fail(folder, key, log, variables):
        with log.open("a") as file:
            file.write(f"{written}\n")
        return code

    monkeypatch.setattr(launch, "train_in_process", fail)
    run = folder / KEYS[0]
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004.ckpt").write_text("x")
    (run / "log.txt").write_text("owlfuse: error: no space left\n")
    (run / "cell.json").write_text(json.dumps({"machine": "another one", "jobs": 4}))
    launch.launch(folder, KEYS[:1], "basic", 1, [], None)
    found = state(folder, KEYS[0])
    assert found["error"].startswith(error)
    # its times are of both attempts
    assert found["jobs"] == 4
    assert found["machine"].startswith("another one; ")
    assert "no space left" in (run / "log.txt").read_text()


def test_after_ctrl_c_and_after_the_deadline_no_cell_is_begun(folder, trained):
    launch.launch(folder, KEYS[:1], "basic", 1, [], time.time() - 1)
    assert state(folder, KEYS[0])["state"] == "not begun"
    assert "minutes were used up" in state(folder, KEYS[0])["error"]
    launch.record_interrupt(folder)
    launch.launch(folder, KEYS[1:], "basic", 1, [], None)
    assert trained.keys == []
    assert state(folder, KEYS[1]) == {}


@pytest.mark.parametrize(
    ("left", "archived"),
    [
        ("step_00000004.ckpt", False),
        ("step_00000004.ckpt.part", True),  # killed while it was written
        ("best.ckpt", True),  # killed before the first one that can go on
    ],
)
def test_a_cell_without_a_checkpoint_that_can_go_on_begins_anew(folder, trained, left, archived):
    begun(folder, f"checkpoints/{left}")
    launch.launch(folder, KEYS[:1], "basic", 1, [], None)
    assert (folder / "old").exists() == archived
    assert (folder / KEYS[0] / "config.yaml").exists() != archived


def test_a_cell_that_another_process_trains_stays_where_it_is(folder, trained):
    begun(folder, "metrics.csv")
    with (folder / KEYS[0] / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launch.launch(folder, KEYS[:1], "basic", 1, [], None)
    assert (folder / KEYS[0] / "config.yaml").exists()


def begun(folder, *names):
    """Files of a run in the first cell's folder."""
    for name in ("config.yaml", *names):
        path = folder / KEYS[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_value_that_a_launcher_does_not_take_is_refused_in_one_line(folder, trained):
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match="launcher settings: .*much") as error:
        launch.launch(folder, KEYS, "submitit_local", 2, ["mem_gb=much"], None)
    assert "\n" not in str(error.value)
    assert trained.keys == []


@pytest.mark.slow
def test_submitit_runs_cells_in_processes_and_a_failure_is_in_the_cells_state(folder):
    """The process of a cell ends at once: its record has no overrides."""
    pytest.importorskip("submitit")
    launch.launch(folder, KEYS[:2], "submitit_local", 1, ["timeout_min=10"], None)
    states = [state(folder, key) for key in KEYS[:2]]
    assert [entry["state"] for entry in states] == ["failed", "failed"]
    assert all("KeyError" in entry["error"] for entry in states)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_an_ablation_runs_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with run_lock(tmp_path / "grid"):
        assert f"cannot be locked: {os.strerror(number)}" in caplog.text
