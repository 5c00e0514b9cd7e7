"""A run's folder: `runs/<experiment>/<name>/` with config.yaml, checkpoints/, metrics.csv, mixture.json, results.json."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from owlfuse.config import ConfigError, origin_of

log = logging.getLogger(__name__)

NAME = "OWLFUSE_RUN_NAME"  # of the environment


def run_folder(config: DictConfig) -> Path:
    """Where the run lies; nothing is written yet.

    Raises:
        ConfigError: a name that is taken.
    """
    if config.resume:
        return Path(config.resume)
    if getattr(rank_zero_only, "rank", 0) == 0:
        os.environ[NAME] = config.name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = os.environ.get(NAME) or config.name or "unnamed"  # ranks that the first one starts inherit its name
    folder = Path(config.runs).expanduser() / config.experiment / name
    if getattr(rank_zero_only, "rank", 0) == 0 and (folder / "config.yaml").exists():
        raise ConfigError(f"name: the run {folder} exists; choose another name=, or go on with it by resume={folder}")
    return folder


@rank_zero_only
def write_config(config: DictConfig, folder: Path) -> None:
    """On the first rank: makes the folder and writes the resolved configuration, from which the run can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    saved.resume = None
    saved.name = folder.name
    OmegaConf.save(saved, folder / "config.yaml")


def write_mixture(folder: Path, report: dict[str, Any]) -> None:
    """mixture.json: what was drawn, left out and cut."""
    (folder / "mixture.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def last_checkpoint(folder: Path) -> Path:
    """The newest good checkpoint of a run, a file or a folder; what is wrong with newer ones is said in a warning.

    Raises:
        ConfigError: there is none.
    """
    found = checkpoints_of(folder / "checkpoints")
    bad: list[str] = []
    for path in found:
        wrong = what_is_wrong(path)
        if wrong is None:
            for line in bad:
                log.warning("%s; going on from %s, the one before", line, path.name)
            best = path.parent / "best.ckpt"
            if best.with_suffix(".json").exists() and (wrong := what_is_wrong(best)):
                log.warning("checkpoint %s %s; the next validation that is better writes it anew", best, wrong)
            return path
        bad.append(f"checkpoint {path} {wrong}")
    why = "; ".join(bad) if bad else f"{folder} has no checkpoint in checkpoints/"
    raise ConfigError(f"resume: {why}; start it anew with another name=")


def checkpoints_of(folder: Path) -> list[Path]:
    """Those in `checkpoints/`, the newest first; last of all `last.ckpt`, as runs once had."""
    last = folder / "last.ckpt"
    return [*sorted(folder.glob("step_*.ckpt"), reverse=True), *([last] if last.exists() else [])]


def step_of(path: Path) -> int:
    """The optimizer steps that a checkpoint was written after."""
    if path.name == "last.ckpt":
        import torch

        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    return int(path.stem.removeprefix("step_"))


def put_in_place(part: Path, path: Path) -> None:
    """Renames a checkpoint that is written to where it belongs, with a manifest. At no moment is there none that is good: a
    new one comes after its manifest, and one that replaces another before, while its manifest waits in a `.json.part`."""
    sync(part)
    manifest = path.with_suffix(".json")
    beside = manifest.with_name(manifest.name + ".part")
    files = {name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for name, file in files_of(part).items()}
    beside.write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    sync(beside)
    if not path.exists():
        beside.replace(manifest)
    old = path.with_name(path.name + ".old.part")
    if path.is_dir():  # a folder is not renamed onto one that holds something
        path.rename(old)
    part.rename(path)
    if beside.exists():
        beside.replace(manifest)
    remove(old)
    sync(path.parent)


def what_is_wrong(path: Path) -> str | None:
    """Why a checkpoint is not to be read, None where it is good."""
    if path.name == "last.ckpt":
        return None if zipfile.is_zipfile(path) else "is truncated or no checkpoint"
    manifest = path.with_suffix(".json")
    wrong = differs_from(path, manifest)
    waiting = manifest.with_name(manifest.name + ".part")
    return None if wrong and waiting.exists() and differs_from(path, waiting) is None else wrong


def differs_from(path: Path, manifest: Path) -> str | None:
    """How a checkpoint is otherwise than its manifest says, None where it is not."""
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"has no manifest {manifest.name} that can be read"
    found = files_of(path)
    for name, (size, digest) in wanted.items():
        label = "" if name == "." else f"{name} "
        if name not in found:
            return f"lacks {name}"
        if (bytes_found := found[name].stat().st_size) != size:
            return f"is damaged: {label}has {bytes_found} bytes of {size}"
        if sha256(found[name]) != digest:
            return f"is damaged: {label}has another sha256 than when it was written"
    return None


def files_of(path: Path) -> dict[str, Path]:
    """The files of a checkpoint: `.` where it is one file, else by their places in the folder."""
    if path.is_file():
        return {".": path}
    return {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}


def sha256(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's names and files, are on the disk."""
    for file in [*files_of(path).values(), path] if path.is_dir() and path.name != "checkpoints" else [path]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """A checkpoint, a file or a folder, with what stands beside it; none need be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if path.name.startswith("step_") and path.suffix == ".ckpt":
        path.with_suffix(".json").unlink(missing_ok=True)
        path.with_suffix(".csv").unlink(missing_ok=True)


def place(config: DictConfig, message: str) -> str:
    """A message that begins with a part of the model, with the file that configures the part before it."""
    part = message.partition(":")[0]
    if part.partition(".")[0] not in config.model:
        return f"experiment {config.experiment}: {message}"
    return f"{origin_of(config, f'model.{part}')}: model.{message}"
