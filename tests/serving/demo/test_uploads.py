"""Only what was uploaded is read and removed, and what nobody asks about goes."""

import os
import time

import pytest

from owlfuse.core.errors import DataError
from owlfuse.serving.demo.uploads import (
    MAX_AGE_SECONDS,
    check_uploaded,
    remove,
    remove_old,
    stored_bytes,
)


@pytest.fixture
def folder(tmp_path):
    """uploads/a/b.png, with secret.png beside uploads and a link to it inside."""
    (tmp_path / "uploads" / "a").mkdir(parents=True)
    (tmp_path / "uploads" / "a" / "b.png").write_bytes(b"123")
    (tmp_path / "secret.png").write_bytes(b"12345")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "uploads"


def test_a_file_beyond_the_uploads_is_refused_and_never_removed(folder):
    beyond = [
        "../secret.png",
        "link.png",
        "a",
        "a/gone.png",
        str(folder.parent / "secret.png"),
        "http://example.com/b.png",
    ]
    for path in beyond:
        with pytest.raises(DataError, match="is not here any more; add it again"):
            check_uploaded(folder / path if "://" not in path else path, folder)
    remove([str(folder / path) for path in beyond], folder)
    assert (folder.parent / "secret.png").exists()
    assert check_uploaded(folder / "a" / "b.png", folder) == (folder / "a" / "b.png").resolve()
    remove([str(folder / "a" / "b.png")], folder)
    assert not (folder / "a" / "b.png").exists()


def test_stored_counts_files_in_all_folders(folder):
    (folder / "link.png").unlink()
    (folder / "c").write_bytes(b"45")
    assert stored_bytes(folder) == 5


def test_uploads_that_nobody_asks_about_go_after_an_hour(folder):
    (folder / "new.png").write_bytes(b"1")
    os.utime(folder / "a" / "b.png", (0, time.time() - MAX_AGE_SECONDS - 1))
    remove_old(folder)
    assert not (folder / "a" / "b.png").exists()
    assert (folder / "new.png").exists()
