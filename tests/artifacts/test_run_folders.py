"""Who may write into a run's folder: two commands that want the same one, and runs that were
killed."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.artifacts.load import with_paths_found
from owlfuse.artifacts.runs import (
    LOCK,
    checkpoints_of,
    in_use,
    last_checkpoint,
    make_timed_folder,
    step_of,
)
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.data.workers import DataWorkers

HOLD = """
import sys, time
from pathlib import Path
from owlfuse.artifacts.runs import in_use
with in_use(Path(sys.argv[1]), sys.argv[2] == "resume"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts another process that holds the folder; it is killed at last."""
    processes = []

    def start(folder, how="new"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", [True, False])
def test_the_second_command_says_who_holds_the_folder(tmp_path, hold, how):
    run = tmp_path / "run"
    holder = hold(run)
    with pytest.raises(ConfigError) as error, in_use(run, how):
        pytest.fail("two processes hold it")
    assert f"{run} is in use by process {holder.pid} on {os.uname().nodename} since 20" in str(
        error.value
    )
    assert (run / LOCK).exists()  # still the other's


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with in_use(tmp_path / "run", False):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert f"cannot be locked: {os.strerror(number)}" in caplog.text


@pytest.mark.slow
def test_what_a_dead_process_held_is_free(tmp_path, hold):
    run = tmp_path / "run"
    holder = hold(run)
    holder.kill()
    holder.wait()
    assert (run / LOCK).exists()
    with in_use(run, True):
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert not run.exists()  # there was nothing in it


@pytest.mark.slow
def test_a_process_that_was_forked_holds_nothing(tmp_path):
    """As data workers are, which outlive a killed run by some seconds."""
    run = tmp_path / "run"
    code = HOLD.replace(
        "    time.sleep(600)",
        "    import os\n    os.fork() or time.sleep(600)\n    os.kill(os.getpid(), 9)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run), "new"], stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.wait()
        with in_use(run, True):
            pass


@pytest.mark.parametrize(
    "left", [["results.json"], ["checkpoints/step_00000004.ckpt"], ["checkpoints/last.ckpt"]]
)
def test_a_run_that_is_there_is_not_written_over(tmp_path, left):
    run = tmp_path / "run"
    for name in ["config.yaml", *left]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    with (
        pytest.raises(ConfigError, match=f"name: the run {run} exists; choose another name="),
        in_use(run, False),
    ):
        pytest.fail("it is written over")
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == sorted(
        Path(n).name for n in ["config.yaml", *left]
    )


def test_a_run_with_its_best_checkpoint_alone_is_not_cleared(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for file in (run / "config.yaml", run / "checkpoints" / "best.ckpt"):
        file.write_text("x")
    with (
        pytest.raises(ConfigError, match="has best.ckpt, which which=best reads"),
        in_use(run, False),
    ):
        pytest.fail("it is written over")
    assert (run / "checkpoints" / "best.ckpt").exists()
    with pytest.raises(ConfigError, match="has best.ckpt alone"):
        last_checkpoint(run)


@pytest.mark.parametrize(
    "left",
    [
        [],
        ["metrics.csv", "events.out.tfevents.1"],
        ["checkpoints/step_00000004.ckpt.part"],
        ["tokenizer/tokenizer.json", "hpc_ckpt_1.ckpt"],
    ],
)
def test_a_run_without_a_checkpoint_begins_anew_in_its_folder(tmp_path, left, capsys):
    run = tmp_path / "run"
    for name in ["config.yaml", "notes of mine.txt", *left]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    with in_use(run, False):
        assert [path.name for path in run.rglob("*") if path.is_file() and path.name != LOCK] == [
            "notes of mine.txt"
        ]
    assert "was begun and has no checkpoint yet, so it begins anew" in capsys.readouterr().out


def test_runs_that_begin_in_one_second_get_folders_of_their_own(tmp_path):
    folders = {make_timed_folder(tmp_path / "runs") for _ in range(20)}
    assert len(folders) == 20
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    for call in (
        lambda: make_timed_folder(tmp_path / "runs"),
        lambda: in_use(tmp_path / "runs" / "a", False).__enter__(),
    ):
        with pytest.raises(DataError, match="^runs: ") as error:
            call()
        assert "\n" not in str(error.value)


def test_what_a_run_starts_from_is_found_from_any_folder(tmp_path, monkeypatch):
    """Also after the whole working folder was moved."""
    run, elsewhere = tmp_path / "work/runs/a/second", tmp_path / "elsewhere"
    for path in (run, elsewhere, tmp_path / "work/runs/a/first/export"):
        path.mkdir(parents=True)
    llm = {"pretrained": "org/model", "gguf_file": None}
    config = {
        "init_from": "runs/a/first/export",
        "model": {"llm": llm, "vision": {"weights": "no.pth"}},
    }
    monkeypatch.chdir(tmp_path / "work")
    assert with_paths_found(config, Path("runs/a/second")) == config
    monkeypatch.chdir(elsewhere)
    found = with_paths_found(config, run)
    assert found == config | {"init_from": str(tmp_path / "work/runs/a/first/export")}


SMALL = [
    "experiment=shapes_owl1",
    *TINY_SHAPES,
    "data.workers=2",
    "data.global_batch_size=4",
    "data.validation_samples=4",
    "model.vision.image_size=32",
    "evaluation.max_questions=1",
    "evaluation.max_new_tokens=1",
    "evaluation.contact_sheet=0",
    "evaluation.decode_tokens=0",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=400",
    "trainer.val_check_interval=400",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    path = tmp_path_factory.mktemp("run_folders")
    write_shapes(str(path / "data" / "shapes"), **SHAPE_COUNTS)
    return path


def start(work, *words):
    """`owlfuse train` in a process group of its own."""
    command = [sys.executable, "-m", "owlfuse", "train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=work, env=environment, start_new_session=True, **pipes)


def wait_for(process, condition, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[0][-3000:]


def end_of(process):
    """Its exit code and output; the whole group is gone soon after it."""
    output = process.communicate(timeout=600)[0]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is left behind")
    assert "Traceback" not in output, output[-3000:]
    return process.returncode, output


def workers_of(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def steps_of(run):
    return [step_of(path) for path in checkpoints_of(run / "checkpoints")]


def begun(run):
    return (run / "metrics.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["before a checkpoint", "between", "validating"])
def test_a_signal_to_the_group_ends_the_run_after_its_step_with_a_checkpoint(work, moment, number):
    name = f"group-{number}-{moment.split()[0]}"
    run = work / "runs" / "shapes_owl1" / name
    words = {"between": ["checkpoint.every=3"], "validating": ["trainer.val_check_interval=2"]}.get(
        moment, []
    )
    process = start(work, *SMALL, *words, f"name={name}")
    ready = (lambda: len(steps_of(run)) >= 2) if words else (lambda: begun(run))
    wait_for(process, ready)
    assert len(workers_of(process)) >= 2
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)  # as `timeout` and SLURM do
    code, output = end_of(process)
    assert code == 130, output[-3000:]
    step = step_of(last_checkpoint(run))
    assert (
        f"stopped at step {step}; go on with: owlfuse train resume=runs/shapes_owl1/{name}"
        in output
    )
    assert not (run / LOCK).exists()
    assert json.loads((run / "mixture.json").read_text())["steps"] == step


@pytest.mark.slow
def test_a_signal_before_the_first_step_and_while_evaluating_ends_in_a_line(work):
    run = work / "runs" / "shapes_owl1" / "early"
    process = start(work, *SMALL, "name=early")
    wait_for(process, lambda: (run / LOCK).exists())
    os.killpg(process.pid, signal.SIGTERM)
    code, output = end_of(process)
    assert code == 130, output[-3000:]
    evaluating = [
        "trainer.max_steps=2",
        "evaluation.max_questions=null",
        "evaluation.batch_size=1",
        "evaluation.max_new_tokens=200",
    ]
    process = start(work, *SMALL, *evaluating, "name=early")  # the same folder
    wait_for(process, lambda: (run / "mixture.json").exists())
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    code, output = end_of(process)
    assert code == 130, output[-3000:]
    assert "go on with: owlfuse eval runs/shapes_owl1/early" in output
    assert step_of(last_checkpoint(run)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before a checkpoint", "between"])
def test_a_killed_worker_is_a_line_with_its_exit_and_a_checkpoint(work, moment):
    name = f"worker-{moment.split()[0]}"
    run = work / "runs" / "shapes_owl1" / name
    process = start(
        work, *SMALL, *(["checkpoint.every=3"] if moment == "between" else []), f"name={name}"
    )
    wait_for(
        process, (lambda: len(steps_of(run)) >= 2) if moment == "between" else (lambda: begun(run))
    )
    worker = workers_of(process)[-1]
    os.kill(worker, signal.SIGKILL)
    code, output = end_of(process)
    assert code == 1, output[-3000:]
    (line,) = [line for line in output.splitlines() if "owlfuse: error" in line]
    step = step_of(last_checkpoint(run))
    assert f"data worker {worker} was ended by signal SIGKILL" in line
    assert f"after step {step}; go on with resume=runs/shapes_owl1/{name}" in line
    assert json.loads((run / "mixture.json").read_text())["steps"] == step
    process = start(work, f"resume=runs/shapes_owl1/{name}", f"trainer.max_steps={step + 2}")
    code, output = end_of(process)
    assert code == 0, output[-3000:]


@pytest.mark.slow
def test_two_commands_for_one_folder_and_one_that_goes_on_after_a_kill(work):
    """The same name, then two resume= at once; a run that is killed before its first checkpoint
    begins by the same command."""
    run = work / "runs" / "shapes_owl1" / "two"
    first = start(work, *SMALL, "name=two")
    wait_for(first, lambda: begun(run))
    for words in ([*SMALL, "name=two"], ["resume=runs/shapes_owl1/two"]):
        code, output = end_of(start(work, *words))
        assert code == 2, output[-3000:]
        assert f"is in use by process {first.pid} on " in output
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert steps_of(run) == []
    again = start(work, *SMALL, "name=two", "trainer.max_steps=2")
    code, output = end_of(again)
    assert code == 0, output[-3000:]
    assert "begins anew" in output
    assert steps_of(run)[0] == 2
    code, output = end_of(start(work, *SMALL, "name=two"))
    assert code == 2
    assert "exists; choose another name=" in output


@pytest.mark.slow
def test_three_runs_started_at_once_have_a_folder_each(work):
    processes = [start(work, *SMALL, "trainer.max_steps=1", "runs=timed") for _ in range(3)]
    for process in processes:
        code, output = end_of(process)
        assert code == 0, output[-3000:]
    assert len(list((work / "timed" / "shapes_owl1").glob("*/results.json"))) == 3


def test_a_copy_of_a_checkpoint_is_none_of_the_runs(tmp_path):
    names = ["step_00000400.ckpt", "step_00000500.ckpt"]
    copies = ["step_00000500_keep.ckpt", "step_00000500_1.ckpt", "step_00000500-copy.ckpt"]
    for name in (*names, *copies):
        (tmp_path / name).write_text("x")
    assert [path.name for path in checkpoints_of(tmp_path)] == names[::-1]


def test_a_data_worker_that_was_ended_is_told_in_a_line():
    workers = DataWorkers()
    process = workers.context.Process(target=time.sleep, args=(600,))
    process.start()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with (
        pytest.raises(DataError, match="was ended by signal SIGKILL.*; the same command goes on"),
        workers.failures_told("the same command goes on"),
    ):
        raise RuntimeError("DataLoader worker is killed")
    with pytest.raises(RuntimeError, match="another"), DataWorkers().failures_told(""):
        raise RuntimeError("another")
