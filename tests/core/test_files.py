"""Atomic writes, and the reading of JSON."""

import json
import os
import resource

import pytest

from owlfuse.core.errors import DataError
from owlfuse.core.files import (
    atomic_directory,
    atomic_write,
    read_json,
    read_json_if_there,
    write_json,
)


def test_a_file_is_replaced_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before")
    synced = []
    fsync = os.fsync

    def record_content_and_sync(handle):
        fsync(handle)
        synced.append((os.fstat(handle).st_size, path.read_text()))

    monkeypatch.setattr(os, "fsync", record_content_and_sync)
    with atomic_write(path) as file:
        file.write("after \u00e4")
        assert path.read_text() == "before"
    assert synced == [(8, "before")]
    assert path.read_bytes() == "after \u00e4".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(error, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(type(error)), atomic_write(path, "wb") as file:  # noqa: PT012
        file.write(b"after")
        raise error
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json(path, ["x" * 5000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write("first")
        second.write("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_name_when_its_block_succeeds(tmp_path):
    with atomic_directory(tmp_path / "new/out") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "new/out").exists()
    assert (tmp_path / "new/out/a").read_text() == "x"
    with (
        pytest.raises(FileExistsError, match="exists and is not empty"),
        atomic_directory(tmp_path / "new/out"),
    ):
        pass
    with pytest.raises(ValueError), atomic_directory(tmp_path / "b"):  # noqa: PT011
        raise ValueError("x")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


NOT_JSON = {
    "missing": (None, "a.json: no such file"),
    "empty": (b"", "a.json: line 1: not JSON: Expecting value"),
    "latin": (b'{"a": "\xe4"}', "a.json: not UTF-8 at byte 7"),
    "deep": (b"[" * 200_000, "a.json: not JSON: nested too deep"),
    "digits": (b"1" * 5000, "a.json: not JSON: Exceeds the limit"),
    "list": (b"[1]", "a.json: holds a list, expected an object"),
    "long": (b" " * 6000, "a.json: more than 5,500 bytes"),
}


@pytest.mark.parametrize(("content", "expected"), NOT_JSON.values(), ids=NOT_JSON)
def test_a_file_that_holds_no_json_object_is_one_line(content, expected, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    limit = 10**6 if "deep" in expected else 5500
    with pytest.raises(DataError, match=expected) as caught:
        read_json(path, limit=limit)
    assert "\n" not in str(caught.value)
    assert read_json_if_there(path) == {}


def test_json_is_read_with_a_byte_order_mark_and_any_text_comes_back(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([1]).encode())
    assert read_json(path, list) == [1]
    write_json(path, {"a": "\ud800 \u4f60"})  # half of a character, as a model may answer
    assert read_json(path) == {"a": "\ud800 \u4f60"}


def test_the_working_folder_itself_may_be_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with atomic_directory(".") as folder:
        (folder / "a").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_behind_a_link_is_written(tmp_path):
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "large" / "disk")
    (tmp_path / "other").symlink_to(tmp_path / "large" / "not there yet")
    for name in ("out", "other"):
        with atomic_directory(tmp_path / name) as folder:
            assert folder.parent == tmp_path / "large"  # where there is room
            (folder / "a").touch()
        assert (tmp_path / name / "a").exists()


def test_a_folder_that_another_process_has_written_meanwhile_is_told(tmp_path):
    def written_by_two():
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "a").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").touch()

    with pytest.raises(FileExistsError, match="written by another process meanwhile"):
        written_by_two()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "b"]
