"""What of the pictures that records name belongs to a run's data."""

from pathlib import Path

from owlfuse.data.identity import content_hash


def test_pictures_outside_of_the_root_and_endless_files_are_not_hashed(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    digest = content_hash(tmp_path / "root", ["../b.png", "a.png"])
    (tmp_path / "b.png").write_bytes(b"another")
    assert content_hash(tmp_path / "root", ["../b.png", "a.png"]) == digest
    (tmp_path / "root" / "a.png").write_bytes(b"c")
    assert content_hash(tmp_path / "root", ["../b.png", "a.png"]) != digest
    # of the size 0, and without an end
    assert content_hash(Path("/proc/self"), ["pagemap"])
