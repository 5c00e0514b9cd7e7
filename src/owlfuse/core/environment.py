"""The environment of a process and its result: what started it, the machine, versions of libraries,
and the state of git."""

from __future__ import annotations

import os
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
        # The commit itself, also where a tag names it.
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


# In the order in which they name a process.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_launched() -> bool:
    """Return whether torchrun or SLURM has started this process, or Lightning's first process."""
    return any(name in os.environ for name in RANK_VARIABLES)


def machine() -> str:
    """Return the GPU's name, or the processor with the threads that torch uses."""
    import torch  # here: the check of a command line reads this module, and must be quick

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.machine()
    # platform.processor() names no model on Linux.
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return f"{processor}, {torch.get_num_threads()} threads"
