"""Reading a checkpoint's folder gives what torch wrote, and runs nothing that somebody else
wrote."""

import os
import pickle

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from owlfuse.core.errors import DataError
from owlfuse.parallel.checkpoints import SafePlanner, SafeReader, read_shards


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
    "content",
    [pickle.dumps(Bomb()), pickle.dumps([Bomb()], 0), b"", b"\x80", pickle.dumps({"a": 1})],
)
def test_a_table_that_is_none_is_refused_and_runs_nothing(content, folder):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(DataError, match=r"\.metadata is no table of a checkpoint"):
        read_shards(folder)
    assert not (folder.parent / "canary").exists()


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
