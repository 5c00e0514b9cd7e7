"""A checkpoint is complete or not there, and what is not complete is named."""

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from owlfuse.artifacts.runs import last_checkpoint
from owlfuse.core.checkpoint_files import (
    MANIFEST,
    commit_checkpoint,
    find_checkpoint_error,
    find_damage,
    partial_path,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHTS = {"w": torch.arange(1000.0)}


def write_checkpoint(path, kind, weights=WEIGHTS):
    part = partial_path(path)
    part.parent.mkdir(exist_ok=True)
    if kind == "file":
        torch.save(weights, part)
    else:
        dcp.save(weights, checkpoint_id=part, no_dist=True)
    commit_checkpoint(path)


def largest_file(path):
    return max(path.rglob("*"), key=lambda file: file.stat().st_size) if path.is_dir() else path


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


DAMAGES = {
    "half of a file": ("file", lambda path: cut(path, 2000), "is truncated or no checkpoint"),
    "last byte": ("file", lambda path: cut(path, 1), "is truncated or no checkpoint"),
    "empty": ("file", lambda path: path.write_bytes(b""), "is truncated or no checkpoint"),
    "zeros": ("file", lambda path: path.write_bytes(bytes(4000)), "is truncated or no checkpoint"),
    "flipped bit": ("file", flip_bit, "is damaged: .*/data/0 differs from its checksum"),
    "half of a shard": ("folder", lambda path: cut(largest_file(path), 2000), "is damaged: .* has"),
    "longer shard": ("folder", lambda path: cut(largest_file(path), -1), "is damaged: .* has"),
    "no shard": ("folder", lambda path: largest_file(path).unlink(), r"lacks .*\.distcp"),
    "no manifest": ("folder", lambda path: (path / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "broken manifest": (
        "folder",
        lambda path: (path / MANIFEST).write_text("{"),
        f"has no {MANIFEST}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    kind, attack, expected = DAMAGES[damage]
    before, newest = (tmp_path / "checkpoints" / f"step_{step:08}.ckpt" for step in (4, 6))
    write_checkpoint(before, kind)
    write_checkpoint(newest, kind)
    assert last_checkpoint(tmp_path) == newest
    attack(newest)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == before
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith(f"checkpoint {newest} ")
    assert re.search(expected, record.getMessage())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_that_is_not_renamed_yet_is_none(kind, tmp_path):
    before, newest = (tmp_path / "checkpoints" / f"step_{step:08}.ckpt" for step in (4, 6))
    write_checkpoint(before, kind)
    write_checkpoint(newest, kind)
    newest.rename(partial_path(newest))
    assert last_checkpoint(tmp_path) == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_file_that_is_replaced_is_complete_if_the_run_is_killed_beside_the_renaming(
    tmp_path, monkeypatch, moment
):
    best = tmp_path / "best.ckpt"
    write_checkpoint(best, "file")
    replace = Path.replace

    def killed(path, target):
        if moment == "after":
            replace(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(best, "file", {"w": torch.zeros(1000)})
    assert find_checkpoint_error(best) is None
    expected = torch.zeros(1000) if moment == "after" else WEIGHTS["w"]
    assert torch.equal(torch.load(best, weights_only=True)["w"], expected)


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_each_kind_replaces_the_other(before, after, tmp_path):
    path = tmp_path / "best.ckpt"
    write_checkpoint(path, before)
    write_checkpoint(path, after)
    assert path.is_dir() == (after == "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]
    assert find_checkpoint_error(path) is None


def test_a_folder_of_a_run_of_before_has_its_manifest_beside_it(tmp_path):
    path = tmp_path / "step_00000006.ckpt"
    dcp.save(WEIGHTS, checkpoint_id=path, no_dist=True)
    sizes = {
        file.name: {"bytes": file.stat().st_size, "sha256": "0" * 64} for file in path.iterdir()
    }
    path.with_suffix(".json").write_text(json.dumps(sizes))
    assert find_checkpoint_error(path) is None
    largest_file(path).unlink()
    assert "lacks" in find_checkpoint_error(path)


def test_no_flipped_bit_of_a_file_becomes_other_weights_or_a_traceback(tmp_path):
    """Neither in the weights nor in the records and the table around them."""
    path = tmp_path / "step_00000006.ckpt"
    weights = {"w": torch.arange(8.0), "count": 3}
    torch.save(weights, path)
    original = path.read_bytes()
    found = 0
    for position in range(0, len(original), 3):
        content = bytearray(original)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        if find_checkpoint_error(path) or find_damage(path):
            found += 1
            continue
        try:
            loaded = torch.load(path, weights_only=True)
        except RuntimeError:  # torch's own words for a file that it cannot open
            continue
        assert torch.equal(loaded["w"], weights["w"]), position
        assert loaded["count"] == 3, position
    assert found > len(original) / 3 / 4
