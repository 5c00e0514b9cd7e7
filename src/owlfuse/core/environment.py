"""The environment of a result: versions of libraries, and the state of git."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def git_state() -> str | None:
    """Return the commit of the code, with `-dirty` where files differ from it; None outside a
    checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


LIBRARIES = ("owlfuse", "torch", "lightning", "transformers", "timm", "peft")


def versions() -> dict[str, str]:
    """Return the versions of owlfuse, Python and the libraries that affect results."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
