"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from owlfuse.types import DataError


@contextmanager
def whole_folder(out: Path | str) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and is gone if anything fails.

    Raises:
        FileExistsError: `out` holds something.
        DataError: a library could not write into it.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        yield beside
        beside.rename(out)  # onto an empty folder too
    except Exception as error:
        # tokenizers and safetensors write by themselves: one raises a bare Exception, the other its own, and no OSError
        if type(error) is Exception or isinstance(error, SafetensorError):
            reason = " ".join(str(error).split())
            raise DataError(f"{out} could not be written: {reason}; make room or permit it, then run it again") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
