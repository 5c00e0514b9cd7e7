"""What results depend on beside code and data: versions of libraries, and the state of git."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def git_state() -> str | None:
    """The commit that the code is at, with `-dirty` where files differ from it; None outside a
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
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


LIBRARIES = ("owlfuse", "torch", "lightning", "transformers", "timm", "peft")


def versions() -> dict[str, str]:
    """Of owlfuse, Python and the libraries that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
