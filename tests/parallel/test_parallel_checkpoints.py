"""Reading a checkpoint's folder gives what torch wrote, and runs nothing that somebody else
wrote; whoever saves a checkpoint gets a whole one."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import saved_by_callers
from owlfuse.core.errors import DataError
from owlfuse.parallel import checkpoints
from owlfuse.parallel.checkpoints import SafePlanner, SafeReader, naming_damaged_parts, read_shards


class Bomb:
    """An object whose pickle leaves a file when it is read."""

    def __reduce__(self):
        return os.system, ("touch canary",)


STATE = {
    "state_dict": {
        f"model.{n}": torch.arange(6.0).view(2, 3).to(t)
        for n, t in (("a", torch.float32), ("b", torch.bfloat16))
    },
    "optimizer_0": {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "none": None,
        "word": "adam",
        "step": torch.tensor(3.0),
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that torch has written, in the working folder."""
    monkeypatch.chdir(tmp_path)
    dcp.save(STATE, checkpoint_id=tmp_path / "step_3.ckpt", no_dist=True)
    return tmp_path / "step_3.ckpt"


def test_all_kinds_of_values_are_read_back(folder):
    state = {
        "state_dict": {
            name: torch.zeros_like(tensor) for name, tensor in STATE["state_dict"].items()
        },
        "optimizer_0": {
            "lr": 0.0,
            "betas": (0.0, 0.0),
            "none": 1,
            "word": "",
            "step": torch.tensor(0.0),
        },
    }
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)
    for name, tensor in STATE["state_dict"].items():
        assert torch.equal(state["state_dict"][name], tensor)
    assert state["optimizer_0"] == STATE["optimizer_0"]
    assert {name: tensor.dtype for name, tensor in read_shards(folder).items()} == {
        "a": torch.float32,
        "b": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("state_dict.model.a", torch.arange(6.0)), ("optimizer_0.step", torch.tensor(3.0))],
)
def test_a_flipped_bit_of_a_part_that_is_loaded_is_named(name, value, folder):
    table = SafeReader(folder).read_metadata()
    part = next(part for index, part in table.storage_data.items() if index.fqn == name)
    file = folder / part.relative_path
    content = bytearray(file.read_bytes())
    content[content.index(value.numpy().tobytes(), part.offset)] ^= 1
    file.write_bytes(content)
    state = {"state_dict": {"model.a": torch.zeros(2, 3), "model.b": torch.zeros(2, 3)}}
    state["optimizer_0"] = {"step": torch.tensor(0.0)}
    error = f"{name} differs from its checksum; delete {folder} to go on from the checkpoint before"
    with pytest.raises(DataError, match=error), naming_damaged_parts():
        dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Bomb()), pickle.dumps([Bomb()], 0), b"", b"\x80", pickle.dumps({"a": 1})],
)
def test_a_table_that_is_none_is_refused_and_runs_nothing(content, folder):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(DataError, match=r"\.metadata is no table of a checkpoint"):
        read_shards(folder)
    assert not (folder.parent / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"relative_path": "/dev/zero"},
        {"relative_path": "../other.distcp"},
        {"relative_path": "missing.distcp"},
        {"length": 10**12},
        {"length": -1},
        {"offset": -1},
    ],
    ids=str,
)
def test_a_part_that_is_in_no_file_of_the_folder_is_refused_unread(change, folder):
    file = folder / ".metadata"
    table = pickle.loads(file.read_bytes())
    for part in table.storage_data.values():
        vars(part).update(change)
    file.write_bytes(pickle.dumps(table))
    (folder.parent / "other.distcp").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"\.metadata is damaged.* the folder has no such part"):
        read_shards(folder)


@pytest.mark.parametrize("size", [(10**7, 10**7), (-1, 3)])
def test_a_tensor_that_is_larger_than_the_files_takes_no_memory(size, folder):
    file = folder / ".metadata"
    table = pickle.loads(file.read_bytes())
    table.state_dict_metadata["state_dict.model.a"].size = torch.Size(size)
    file.write_bytes(pickle.dumps(table))
    with pytest.raises(DataError, match=r"\.metadata is damaged: a has .* bytes, and the folder"):
        read_shards(folder)


def test_a_value_that_is_a_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save(
        {"optimizer_0": {"lr": Bomb()}, "state_dict": {"model.a": Bomb()}},
        checkpoint_id=tmp_path / "evil",
        no_dist=True,
    )
    (tmp_path / "canary").unlink(missing_ok=True)  # of writing it
    with pytest.raises(CheckpointException):
        dcp.load(
            {"optimizer_0": {"lr": 0.0}},
            storage_reader=SafeReader(tmp_path / "evil"),
            planner=SafePlanner(),
            no_dist=True,
        )
    with pytest.raises(DataError, match="expected a tensor"):
        read_shards(tmp_path / "evil")
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def no_group_left():
    """Ends the process group of a strategy that ran in this process."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_ours", [True, False], ids=["beside our callback", "without it"])
@pytest.mark.parametrize("strategy", ["auto", "replicated", "sharded"])
def test_whoever_saves_a_checkpoint_gets_a_whole_one(strategy, with_ours, tmp_path, no_group_left):
    saved_by_callers.train(strategy, tmp_path, with_ours=with_ours)
    assert len(list(tmp_path.glob("checkpoints/step_*.ckpt"))) == 2 * with_ours


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_whoever_saves_a_checkpoint_on_two_ranks_gets_a_whole_one(strategy, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(saved_by_callers.__file__)
    command = [*torchrun, str(script), strategy, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "mine").iterdir())) == 2


def test_a_part_that_another_machine_wrote_to_its_own_disk_is_missed(tmp_path, monkeypatch):
    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path)
    checkpoints.check_all_there(tmp_path)
    (part,) = tmp_path.glob("*.distcp")
    part.unlink()
    waits = []
    monkeypatch.setattr(checkpoints.time, "sleep", waits.append)
    with pytest.raises(DataError, match=f"lacks {part.name}, which another machine has written"):
        checkpoints.check_all_there(tmp_path)
    assert sum(waits) >= 5  # a network's file system may be late
