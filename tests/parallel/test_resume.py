"""Runs of several processes that stop and go on: on as many processes or others, and whatever is
killed when."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_parallel import LORA, OWL3, SMALL, TWO, column
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers import SHAPE_COUNTS
from owlfuse.artifacts.runs import checkpoints_of, last_checkpoint, step_of
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.training import train
from ranks import SLOW_WRITES, by_processes, gathered, record_samples

pytestmark = pytest.mark.slow  # minutes: five runs of two processes, and what goes on from them

STEPS, HALF, BATCH = 6, 3, 8
COMMON = [
    *SMALL,
    *OWL3,
    f"data.global_batch_size={BATCH}",
    f"trainer.max_steps={STEPS}",
    f"checkpoint.every={HALF}",
]
COMMON += ["checkpoint.keep=9"]
DROPOUT = [*LORA, "model.adapter.llm.dropout=0.2", "model.adapter.fusion.dropout=0.2"]

BACKGROUND = ["checkpoint.background=true", SLOW_WRITES]
WHOLE = {
    "ddp": ["trainer=ddp", *TWO],
    "fsdp": ["trainer=fsdp", *TWO],
    "ddp-dropout": ["trainer=ddp", *TWO, *DROPOUT],
    "fsdp-dropout": ["trainer=fsdp", *TWO, *DROPOUT],
    "fsdp-background": ["trainer=fsdp", *TWO, *DROPOUT, *BACKGROUND],
}
"""Runs of two processes that are never stopped; each checkpoint of theirs is kept."""
TENSOR = ["trainer.strategy.data=1", "trainer.strategy.tensor=2"]
ON_TWO = {
    "one-on-ddp": ("one", ["trainer.devices=2", "trainer.strategy=ddp"]),
    "fsdp-on-tp": ("fsdp", TENSOR),
    "ddp-dropout-on-ddp": ("ddp-dropout", []),
    "fsdp-background-on-fsdp": ("fsdp-background", BACKGROUND),
}
"""What goes on from the half of which run, by two processes."""


def cut(folder, whole, name):
    """A copy of a run as it was in the middle."""
    run = folder / "cut" / name
    shutil.copytree(folder / "runs" / "shapes_owl3" / whole, run)
    for path in (run / "checkpoints").glob(f"step_{STEPS:08}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert step_of(last_checkpoint(run)) == HALF
    return run


def by_this_process(run_overrides):
    """Trains by one process, and leaves neither a process group nor its environment behind."""
    before = dict(os.environ)
    try:
        with pytest.MonkeyPatch.context() as patch:
            seen = record_samples(patch)
            run = train.run(compose(run_overrides))
            (Path(run) / "samples.json").write_text(json.dumps(gathered(seen)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def whole_of(folder, name):
    return folder / "runs" / "shapes_owl3" / name


def start(folder, *overrides):
    """`owlfuse train`, which starts the second rank itself."""
    command = [sys.executable, "-m", "owlfuse", "train", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def wait_for(process, condition, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0][-4000:]


def second_rank(process):
    (child,) = [
        pid
        for pid in map(int, children(process.pid))
        if "owlfuse" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    return child


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def end_of(process):
    """What the first rank says after the second was killed; it ends by itself."""
    output = process.communicate(timeout=600)[0]
    by_lightning = (
        process.returncode == -signal.SIGKILL and "Child process" in output
    )  # which watches the others, and may be first
    assert process.returncode == 1 or by_lightning, output[-4000:]
    return output


KILLED = [
    *COMMON,
    *WHOLE["fsdp-dropout"],
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "trainer.max_steps=40",
]


def being_written(run):
    return any(run.glob("checkpoints/step_*.ckpt.part"))


def kill_second_rank(folder):
    """Of a run, while a checkpoint is written; gives how to go on."""
    run = whole_of(folder, "killed")
    process = start(folder, *KILLED, "name=killed", "checkpoint.background=true")
    wait_for(process, lambda: len(checkpoints_of(run / "checkpoints")) == 2 and being_written(run))
    os.kill(second_rank(process), signal.SIGKILL)
    (folder / "killed.log").write_text(end_of(process))
    return [f"resume={run}", f"trainer.max_steps={step_of(last_checkpoint(run)) + 2}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all these runs lie once they are done."""
    path = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        by_this_process([*COMMON, "name=one"])
        by_processes(
            2, [[*COMMON, *words, f"name={name}"] for name, words in WHOLE.items()], path, "whole"
        )
        again = [
            [f"resume={cut(path, whole, name)}", *words] for name, (whole, words) in ON_TWO.items()
        ]
        by_processes(2, [*again, kill_second_rank(path)], path, "again")
        for kind in ("ddp", "fsdp"):
            by_this_process([f"resume={cut(path, kind, f'{kind}-on-one')}", "trainer.devices=1"])
        yield path


def losses(run):
    found = column(run, "train/loss")
    assert len(found) == STEPS
    return found


def state(path, scratch):
    """All tensors of a checkpoint by name, of weights and optimizer."""
    dcp_to_torch_save(path, scratch)
    found = torch.load(scratch, weights_only=True)
    flat = {f"state_dict.{name}": value for name, value in found["state_dict"].items()}
    return flat | {
        name: value
        for name, value in found["optimizer_0"].items()
        if isinstance(value, torch.Tensor)
    }


def batches(run, first):
    """The samples of each step from `first` on, of all ranks in their order."""
    ranks = json.loads((run / "samples.json").read_text())
    size = BATCH // len(ranks)
    return [
        [s for rank in ranks for s in rank[step * size : (step + 1) * size]]
        for step in range(STEPS - first)
    ]


@pytest.mark.parametrize("name", ["one-on-ddp", "fsdp-on-tp", "fsdp-on-one", "ddp-on-one"])
def test_a_run_goes_on_with_other_processes_as_if_never_stopped(folder, name):
    whole = name.partition("-")[0]
    assert losses(folder / "cut" / name) == pytest.approx(losses(whole_of(folder, whole)), abs=1e-5)


@pytest.mark.parametrize("name", ["ddp-dropout", "fsdp-background"])
def test_two_processes_with_dropout_go_on_bit_for_bit(folder, name):
    """As many ranks get their own random states back; what fsdp wrote was written in the
    background."""
    kind = name.partition("-")[0]
    assert losses(folder / "cut" / f"{name}-on-{kind}") == losses(whole_of(folder, name))


def test_ranks_drop_out_other_positions(folder):
    checkpoint = torch.load(last_checkpoint(whole_of(folder, "ddp-dropout")), weights_only=True)
    first, second = (states["torch"] for states in checkpoint["random_states"])
    assert not torch.equal(first, second)


def test_dropout_that_differs_on_other_ranks_is_said(folder):
    said = "the checkpoint is of 1 ranks, 1 of them with rows of their own, and 2 (2) go on"
    assert (folder / "again.log").read_text().count(said) == 1
    assert (
        "the checkpoint is of 2 ranks, 2 of them with rows of their own, and 2 (1) go on"
        in (folder / "again.log").read_text()
    )


@pytest.mark.parametrize(
    "run", ["runs/shapes_owl3/ddp", "cut/ddp-on-one", "cut/one-on-ddp", "cut/fsdp-on-one"]
)
def test_the_global_batches_are_those_of_one_process(folder, run):
    first = HALF if run.startswith("cut/") else 0
    assert batches(folder / run, first) == batches(whole_of(folder, "one"), 0)[first:]


def test_weights_that_change_while_shards_are_written_do_not_reach_them(folder, tmp_path):
    name = f"checkpoints/step_{HALF:08}.ckpt"
    late = state(whole_of(folder, "fsdp-background") / name, tmp_path / "late.pt")
    at_once = state(whole_of(folder, "fsdp-dropout") / name, tmp_path / "once.pt")
    assert late.keys() == at_once.keys()
    assert len(late) > 20
    assert [key for key in late if not torch.equal(late[key], at_once[key])] == []


def test_shards_are_not_read_by_a_trainer_without(folder):
    run = cut(folder, "fsdp", "refused")
    with pytest.raises(ConfigError, match="is sharded, and this trainer is not"):
        train.run(compose([f"resume={run}", "trainer.strategy=auto", "trainer.devices=1"]))


def test_a_rank_killed_while_shards_are_written_ends_the_other_in_a_line_and_the_run_goes_on(
    folder,
):
    """The one before is intact, and nothing of what was half written is taken for a checkpoint."""
    run, output = whole_of(folder, "killed"), (folder / "killed.log").read_text()
    for line in (line for line in output.splitlines() if "owlfuse: error" in line):
        assert f"resume=runs/shapes_owl3/{run.name}" in line
    (before,) = re.findall(
        r"going on from .*/killed/checkpoints/step_(\d+).ckpt", (folder / "again.log").read_text()
    )
    assert int(before) >= 2
    assert step_of(last_checkpoint(run)) == int(before) + 2
    assert not being_written(run)
    numbers = column(run, "step")
    assert numbers == sorted(numbers)
    assert len(column(run, "train/loss")) == int(before) + 2


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_ranks_killed_at_random_moments_change_no_loss(folder, background):
    """One rank or both, in a step or while a checkpoint is written."""
    name, chance = f"random-{background}", random.Random(5)
    run = whole_of(folder, name)
    words = [*KILLED, f"checkpoint.background={background}".lower()]
    process = start(folder, *words, f"name={name}")
    for number in range(6):
        was = step_of(last_checkpoint(run)) if run.exists() else 0
        wait_for(
            process,
            lambda was=was: any(
                step_of(path) > was for path in checkpoints_of(run / "checkpoints")
            ),
        )
        time.sleep(chance.uniform(0, 0.5))
        if number % 2:
            wait_for(process, lambda: being_written(run))
        if process.poll() is None:
            os.kill(second_rank(process), signal.SIGKILL) if number % 3 else os.killpg(
                process.pid, signal.SIGKILL
            )
        process.communicate(timeout=600)
        process = start(folder, f"resume={run}")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]
    by_processes(2, [[*words, "name=never-stopped-" + name]], folder, name)
    assert column(run, "train/loss") == column(
        whole_of(folder, "never-stopped-" + name), "train/loss"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_ends_both_after_the_same_step_with_a_checkpoint(folder, kind):
    run = whole_of(folder, f"stopped-{kind}")
    words = [
        "trainer.max_steps=400",
        "checkpoint.every=1",
        "checkpoint.background=true",
        f"name=stopped-{kind}",
    ]
    process = start(folder, *COMMON, *WHOLE[kind], *words)
    wait_for(process, lambda: len(checkpoints_of(run / "checkpoints")) >= 2)
    os.kill(second_rank(process), signal.SIGTERM)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 130, output[-4000:]
    assert output.count("stopping after the next step of all ranks") == 1
    (stopped,) = set(re.findall(r"stopped at step (\d+)", output))  # each rank says it
    assert step_of(last_checkpoint(run)) == int(stopped)


@pytest.mark.slow
def test_four_ranks_go_on_from_two_and_from_one_and_two_from_four(folder):
    """Sharded and not; the same samples, and losses within 1e-5."""
    four = ["trainer.devices=4"]
    wholes = [[*COMMON, *WHOLE[kind], *four, f"name={kind}-four"] for kind in ("ddp", "fsdp")]
    on_four = {"two-on-four": "ddp", "fsdp-on-four": "fsdp", "one-on-four": "one"}
    words = {"one-on-four": ["trainer.strategy=ddp"]}
    again = [
        [f"resume={cut(folder, whole, name)}", *four, *words.get(name, [])]
        for name, whole in on_four.items()
    ]
    by_processes(4, [*wholes, *again], folder, "four")
    mesh = [
        f"resume={cut(folder, 'fsdp', 'fsdp-on-mesh')}",
        *four,
        "trainer.strategy.data=2",
        "trainer.strategy.tensor=2",
    ]
    by_processes(4, [mesh], folder, "mesh")
    on_two = {"ddp-four-on-two": "ddp-four", "fsdp-four-on-two": "fsdp-four"}
    runs = [
        [f"resume={cut(folder, whole, name)}", "trainer.devices=2"]
        for name, whole in on_two.items()
    ]
    by_processes(2, runs, folder, "four-on-two")
    expected = pytest.approx(losses(whole_of(folder, "one")), abs=1e-5)
    for name in (*on_four, *on_two, "fsdp-on-mesh"):
        assert losses(folder / "cut" / name) == expected, name
    for name in (*on_four, *on_two):
        assert batches(folder / "cut" / name, HALF) == batches(whole_of(folder, "one"), 0)[HALF:], (
            name
        )
