"""Checkpoints: a run killed at any moment goes on bit for bit, a damaged checkpoint is passed
over, a full disk is told."""

import csv
import errno
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from omegaconf import open_dict

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.artifacts.load import load_run
from owlfuse.artifacts.runs import checkpoints_of, last_checkpoint, step_of
from owlfuse.config.compose import compose
from owlfuse.core.checkpoint_files import find_checkpoint_error
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.evaluation.validation import evaluate_run
from owlfuse.parallel import checkpoints
from owlfuse.parallel.checkpoints import BACKGROUND, CheckpointWriter
from owlfuse.training import train
from owlfuse.training.checkpoints import Best, Checkpoints
from owlfuse.training.module import MultimodalModule
from owlfuse.training.trainer import check_callbacks, make_callbacks, validates

# Every test here trains, or damages what a training has left.
pytestmark = pytest.mark.slow

TINY = [
    "experiment=shapes_owl1",
    *TINY_SHAPES,
    "data.workers=0",
    "data.global_batch_size=4",
    "data.validation_samples=4",
    "model.vision.image_size=32",
    "evaluation.max_questions=1",
    "evaluation.max_new_tokens=1",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "model/adapter@model.adapter.llm=lora",
    "model/adapter@model.adapter.vision=frozen",
    "model.adapter.llm.dropout=0.2",
]
HARD = [
    *TINY,
    "model.vision.image_size=64",
    "data.micro_batch_size=2",
    "data.pack_to=512",
    "data.workers=1",
]
HARD += ["trainer.max_steps=24", "checkpoint.every=2"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        yield path


@pytest.fixture(scope="module")
def finished(folder):
    return train.run(compose([*TINY, "name=finished", "checkpoint.every=2"]))


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run again, to be damaged."""
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def start(*overrides, limit=None):
    command = [sys.executable, "-m", "owlfuse", "train", *overrides]
    # other threads, other last bits
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kept = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=threads, start_new_session=True, preexec_fn=kept, **pipes)


def kill(process):
    """SIGKILL, the loading processes too."""
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def wait_for(process, condition, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.001)


def rows(folder):
    """Step, training loss and validation loss of each row that has one."""
    with (folder / "metrics.csv").open() as file:
        found = [(r["step"], r.get("train/loss"), r.get("val/loss")) for r in csv.DictReader(file)]
    return [row for row in found if row[1] or row[2]]


def assert_the_same(run, whole):
    assert rows(run) == rows(whole)
    a, b = (torch.load(last_checkpoint(folder), weights_only=True) for folder in (run, whole))
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(
        torch.equal(tensor, b["state_dict"][name]) for name, tensor in a["state_dict"].items()
    )
    assert a["frozen"] == b["frozen"]


def go_on(run):
    return train.run(compose([f"resume={run}"]))


def steps(run):
    return [step_of(path) for path in checkpoints_of(run / "checkpoints")]


def test_a_run_killed_twice_goes_on_bit_for_bit_with_lora_dropout_accumulation_packing_and_a_worker(
    folder, capsys
):
    """The first time after some steps, the second while a checkpoint is being written in the
    background."""
    run = Path("runs/shapes_owl1/killed")
    process = start(*HARD, "name=killed")
    wait_for(process, lambda: len(steps(run)) >= 2)
    kill(process)
    before = steps(run)[0]
    assert 0 < before < 24
    process = start(f"resume={run}", "checkpoint.background=true")
    wait_for(
        process, lambda: steps(run)[0] > before and list((run / "checkpoints").glob("*.ckpt.part"))
    )
    output = kill(process)
    assert f"going on from {run}/checkpoints/step_{before:08}.ckpt at step {before}" in output
    between = step_of(last_checkpoint(run))
    assert before < between < 24
    go_on(run)
    assert f"at step {between}" in capsys.readouterr().out
    whole = train.run(compose([*HARD, "name=whole"]))
    assert_the_same(run, whole)
    assert list((run / "checkpoints").glob("*.part")) == []


def test_twenty_kills_at_random_moments_change_no_bit(folder):
    """Half of them while a checkpoint is being written."""
    common = [*HARD, "trainer.max_steps=300", "checkpoint.every=3"]
    run, chance = Path("runs/shapes_owl1/twenty"), random.Random(3)
    seen = []
    process = start(*common, "name=twenty")
    for number in range(20):
        was = steps(run)[0] if run.exists() and steps(run) else 0
        wait_for(process, lambda was=was: bool(steps(run)) and steps(run)[0] > was)
        time.sleep(chance.uniform(0, 0.4))
        if number % 2:
            wait_for(process, lambda: list((run / "checkpoints").glob("*.part")))
        kill(process)
        seen.append(step_of(last_checkpoint(run)))
        process = start(f"resume={run}")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert seen == sorted(set(seen))
    assert_the_same(run, train.run(compose([*common, "name=uninterrupted"])))


def test_the_newest_are_kept_and_each_holds_what_is_trained_but_not_what_is_frozen(finished):
    assert steps(finished) == [6, 4]
    assert (finished / "checkpoints" / "best.ckpt").exists()
    checkpoint = torch.load(last_checkpoint(finished), weights_only=True)
    names = set(checkpoint["state_dict"])
    assert any("lora_A" in name for name in names)
    assert any(name.startswith("model.connector") for name in names)
    assert not any("base_layer" in name or "embed_tokens" in name for name in names)
    vision = {name.rpartition(".")[2] for name in names if name.startswith("model.vision")}
    assert vision <= {"running_mean", "running_var", "num_batches_tracked"}
    assert set(checkpoint["frozen"]) == {"vision", "llm"}


def test_a_frozen_base_made_at_random_is_made_again_for_eval_and_export(finished):
    before = json.loads((finished / "results.json").read_text())["metrics"]
    torch.rand(7)
    evaluate_run(str(finished), [])
    after = json.loads((finished / "results.json").read_text())["metrics"]
    assert after == pytest.approx(before, abs=1e-5, rel=1e-5)
    torch.rand(7)
    load_run(finished)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (truncate, "is truncated or no checkpoint"),
        (flip_byte, r"is damaged: \S+ differs from its checksum"),
    ],
)
def test_a_run_goes_on_from_the_one_before_and_ends_the_same(copy, finished, caplog, damage, error):
    path = copy / "checkpoints" / "step_00000006.ckpt"
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert_the_same(go_on(copy), finished)
    messages = [record.getMessage() for record in caplog.records]
    line = f"checkpoint {re.escape(str(path))} {error}; going on from step_00000004.ckpt, the one"
    assert any(re.match(line, message) for message in messages)
    assert steps(copy) == [6, 4]


def test_a_flipped_byte_of_the_best_checkpoint_is_named(copy):
    flip_byte(copy / "checkpoints" / "best.ckpt")
    with pytest.raises(ConfigError, match=r"best\.ckpt is damaged: .*; take which=last"):
        load_run(copy, which="best")


def test_no_good_checkpoint_is_an_error_that_names_each(copy):
    for path in checkpoints_of(copy / "checkpoints"):
        truncate(path)
    with pytest.raises(
        ConfigError,
        match=r"resume: checkpoint .*step_00000006.ckpt is truncated.*step_00000004.ckpt is trunc",
    ):
        last_checkpoint(copy)


def test_last_ckpt_of_an_old_run_is_read_and_a_truncated_one_is_not(copy):
    newest = last_checkpoint(copy)
    (copy / "checkpoints" / "last.ckpt").write_bytes(newest.read_bytes())
    for path in (copy / "checkpoints").glob("step_*"):
        path.unlink()
    assert step_of(last_checkpoint(copy)) == 6
    truncate(copy / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match=r"last.ckpt is truncated or no checkpoint"):
        last_checkpoint(copy)


def test_another_frozen_base_is_refused_and_its_part_named(copy):
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("\nseed: 0\n", "\nseed: 9\n"))
    with pytest.raises(
        DataError,
        match=(
            "the frozen weights of llm, vision are not those that the checkpoint was trained with"
        ),
    ):
        load_run(copy)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_disk_that_is_full_ends_the_run_in_one_line_with_the_last_checkpoint_intact(
    copy, background
):
    """No file may grow over half a checkpoint."""
    size = (copy / "checkpoints" / "step_00000006.ckpt").stat().st_size
    process = start(
        f"resume={copy}",
        "trainer.max_steps=8",
        f"checkpoint.background={background}",
        limit=size // 2,
    )
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    (line,) = [line for line in output.splitlines() if "owlfuse: error" in line]
    assert (
        "step_00000008.ckpt could not be written: File too large; the checkpoints before it are "
        "intact"
    ) in line
    assert "Traceback" not in output
    assert list((copy / "checkpoints").glob("*.part")) == []
    assert last_checkpoint(copy).name == "step_00000006.ckpt"


@pytest.fixture
def held(monkeypatch):
    """Writes wait until the test lets them go on; a list of the files that are about to be
    written."""
    asked, event, write = [], threading.Event(), checkpoints.write_file

    def late(checkpoint, path):
        asked.append(path.name)
        assert event.wait(60)
        write(checkpoint, path)

    monkeypatch.setattr(checkpoints, "write_file", late)
    return asked, event


def test_weights_that_change_while_a_checkpoint_is_written_do_not_reach_it(
    finished, held, monkeypatch
):
    """It holds what a run that waited for the write has in it, and is written when two more
    steps are done."""
    asked, event = held
    ended = MultimodalModule.on_before_optimizer_step

    def step_and_release(module, optimizer):
        ended(module, optimizer)
        if module.global_step == 5:  # the sixth step: the checkpoint is of the fourth
            assert asked == ["step_00000004.ckpt.part"]
            event.set()

    monkeypatch.setattr(MultimodalModule, "on_before_optimizer_step", step_and_release)
    words = [
        "name=late",
        "checkpoint.every=4",
        "checkpoint.background=true",
        "trainer.val_check_interval=6",
    ]
    run = train.run(compose([*TINY, *words]))
    assert steps(run) == [6, 4]
    late, at_once = (
        torch.load(folder / "checkpoints" / "step_00000004.ckpt", weights_only=True)
        for folder in (run, finished)
    )
    assert differing(late["state_dict"], at_once["state_dict"]) == []
    assert differing(late["optimizer_states"], at_once["optimizer_states"]) == []
    assert differing(late["random_states"], at_once["random_states"]) == []
    size = (finished / "checkpoints" / "step_00000004.ckpt").stat().st_size
    # what is shared is there once
    assert abs((run / "checkpoints" / "step_00000004.ckpt").stat().st_size - size) < size / 50


def differing(mine, theirs, place=""):
    """Where two nested states differ, bit for bit."""
    if isinstance(mine, torch.Tensor):
        return [] if torch.equal(mine, theirs) else [place]
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), place
        return [
            found for key in mine for found in differing(mine[key], theirs[key], f"{place}.{key}")
        ]
    if isinstance(mine, list | tuple):
        assert len(mine) == len(theirs), place
        return [
            found
            for i, (a, b) in enumerate(zip(mine, theirs))
            for found in differing(a, b, f"{place}.{i}")
        ]
    return [] if mine == theirs else [place]


def test_the_best_value_is_remembered_where_a_run_was_moved(tmp_path):
    """Lightning's ModelCheckpoint forgets it, and a worse validation would replace best.ckpt."""
    before, after = Best("val/loss"), Best("val/loss")
    before.best_model_score = torch.tensor(0.3)
    after.dirpath = str(tmp_path / "moved")
    after.load_state_dict(before.state_dict())
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    assert not after.check_monitor_top_k(trainer, torch.tensor(0.3))
    assert after.check_monitor_top_k(trainer, torch.tensor(0.29))
    assert after.best_model_path == str(tmp_path / "moved" / "best.ckpt")


def test_a_validation_without_a_loss_is_not_the_best(tmp_path):
    best = Best("val/loss")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    # otherwise Lightning raises MisconfigurationException
    trainer.fit_loop.epoch_loop.val_loop._has_run = True
    best._should_skip_saving_checkpoint = lambda trainer: False
    best.on_validation_end(trainer, None)
    assert best.best_model_score is None


def test_one_write_is_pending_at_most_and_nothing_is_deleted_before_it_has_succeeded(
    tmp_path, held
):
    asked, event = held
    writer, content = CheckpointWriter(), {"w": torch.zeros(4)}
    paths = [tmp_path / "checkpoints" / f"step_{step:08}.ckpt" for step in (1, 2, 3)]
    event.set()
    writer.save_checkpoint(content, paths[0])
    event.clear()
    content["w"] += 1
    writer.save_checkpoint(content, paths[1], BACKGROUND)
    writer.remove_checkpoint(paths[0])
    content["w"] += 1
    assert checkpoints_of(tmp_path / "checkpoints") == [paths[0]]
    threading.Timer(0.2, event.set).start()
    writer.save_checkpoint(content, paths[2], BACKGROUND)
    assert checkpoints_of(tmp_path / "checkpoints")[-1] == paths[1]
    writer.remove_checkpoint(paths[1])
    writer.wait()
    assert checkpoints_of(tmp_path / "checkpoints") == [paths[2]]
    assert torch.load(paths[2], weights_only=True)["w"].tolist() == [2.0] * 4
    assert asked == [f"{path.name}.part" for path in paths]
    writer.teardown()


def test_an_error_of_the_background_is_raised_by_the_next_write_and_what_was_there_stays(
    tmp_path, monkeypatch
):
    writer, content = CheckpointWriter(), {"w": torch.zeros(4)}
    good, lost, late = (tmp_path / f"step_{step:08}.ckpt" for step in (1, 2, 3))
    writer.save_checkpoint(content, good)

    def full(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(checkpoints, "write_file", full)
    writer.save_checkpoint(content, lost, BACKGROUND)
    writer.remove_checkpoint(good)
    with pytest.raises(
        DataError, match="step_00000002.ckpt could not be written: No space left on device; the"
    ):
        writer.save_checkpoint(content, late, BACKGROUND)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.ckpt"]
    assert find_checkpoint_error(good) is None
    writer.teardown()


def test_ctrl_c_waits_for_the_write_that_is_pending(folder):
    """After the step it is in the run ends with a whole checkpoint of it."""
    run = Path("runs/shapes_owl1/stopped")
    process = start(
        *TINY,
        "name=stopped",
        "trainer.max_steps=400",
        "checkpoint.every=1",
        "checkpoint.background=true",
    )
    wait_for(
        process, lambda: len(steps(run)) == 2 and list((run / "checkpoints").glob("*.ckpt.part"))
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130, output
    (stopped,) = re.findall(r"stopped at step (\d+)", output)
    assert step_of(last_checkpoint(run)) == int(stopped)
    assert list((run / "checkpoints").glob("*.part")) == []


@pytest.mark.parametrize("wrong", ["checkpoint.every=0", "checkpoint.keep=0"])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=wrong.replace("=", " is ")):
        train.run(compose([*TINY, "name=wrong", wrong]))


def test_an_unknown_option_is_refused():
    with pytest.raises(
        ConfigError, match="checkpoint.evry: no such key of .*; did you mean 'every'"
    ):
        compose([*TINY, "+checkpoint.evry=2"])


def test_without_a_validation_there_is_a_checkpoint_where_one_would_be():
    def intervals(*words, validation=("val",), samples=8):
        config = compose(["experiment=shapes_owl3", "trainer.val_check_interval=30", *words])
        data = SimpleNamespace(validation=dict.fromkeys(validation), validation_samples=samples)
        every = None if validates(config, data) else config.trainer.val_check_interval
        callbacks = make_callbacks(config.checkpoint, None, every)
        return next(c for c in callbacks if isinstance(c, Checkpoints))._every_n_train_steps

    assert intervals() == 0
    assert intervals(validation=()) == 30
    assert intervals(samples=0) == 30
    assert intervals("+trainer.limit_val_batches=0") == 30
    assert intervals("checkpoint.every=7", validation=()) == 7


@pytest.mark.parametrize(
    ("word", "message"),
    [("+trainer.max_time=00:01:00:00", "trainer.max_time is 00:01:00:00, expected none")],
)
def test_a_time_limit_that_breaks_off_a_step_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=shapes_owl3", word])


@pytest.mark.parametrize(
    ("callback", "message"),
    [("Timer", "would break off a step"), ("StochasticWeightAveraging", "counts epochs")],
)
def test_callbacks_of_lightning_that_would_break_a_run_are_refused(callback, message):
    target = f"lightning.pytorch.callbacks.{callback}"
    config = compose(["experiment=shapes_owl3"])
    with open_dict(config):
        config.callbacks = {"mine": {"_target_": target}}
    trainer = SimpleNamespace(precision="32-true", strategy=None)
    with pytest.raises(ConfigError, match=f"callbacks.mine: {callback} {message}"):
        check_callbacks(trainer, config)
