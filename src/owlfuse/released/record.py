"""What a model remembers of the released folder it came from, kept beside its weights in owlfuse's own format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from owlfuse.released.loading import KEPT_FILES, Released
from owlfuse.types import DataError


def write_record(released: Released, folder: Path) -> None:
    """The released JSON files, the tensors that the model does not use, and each tensor's type and shape."""
    folder.mkdir(parents=True)
    for name, content in released.files.items():
        (folder / name).write_bytes(content)
    if released.kept:
        save_file(dict(released.kept), folder / "kept.safetensors", metadata={"format": "pt"})
    rest = {name: value for name, value in vars(released).items() if name not in ("kept", "files", "config")}
    rest["dtypes"] = {name: dtype and str(dtype).removeprefix("torch.") for name, dtype in released.dtypes.items()}
    rest["files"] = sorted(released.files)
    (folder / "record.json").write_text(json.dumps(rest) + "\n")


def read_record(folder: Path) -> Released:
    """What `write_record` wrote. Raises DataError where it is damaged."""
    try:
        rest = json.loads((folder / "record.json").read_text())
        names = rest.pop("files")
        if strange := set(names) - set(KEPT_FILES):
            raise ValueError(f"it names {min(map(str, strange))[:80]}")
        files = {name: (folder / name).read_bytes() for name in names}
        kept = load_file(folder / "kept.safetensors") if (folder / "kept.safetensors").exists() else {}
        rest["dtypes"] = {name: dtype and getattr(torch, dtype) for name, dtype in rest["dtypes"].items()}
        rest["shapes"] = {name: tuple(shape) for name, shape in rest["shapes"].items()}
        return Released(**rest, config=json.loads(files["config.json"]), kept=kept, files=files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder} is damaged ({error}); import the released folder anew") from error
