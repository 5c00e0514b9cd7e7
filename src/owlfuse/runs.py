"""A run's folder: `runs/<experiment>/<name>/` with config.yaml, checkpoints/, metrics.csv, mixture.json, results.json."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from owlfuse.config import ConfigError, origin_of

NAME = "OWLFUSE_RUN_NAME"  # of the environment


def run_folder(config: DictConfig) -> Path:
    """Where the run lies; nothing is written yet.

    Raises:
        ConfigError: a name that is taken, or a resume without a checkpoint.
    """
    if config.resume:
        last_checkpoint(Path(config.resume))
        return Path(config.resume)
    if rank_zero_only.rank == 0:
        os.environ[NAME] = config.name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = os.environ.get(NAME) or config.name or "unnamed"  # ranks that the first one starts inherit its name
    folder = Path(config.runs).expanduser() / config.experiment / name
    if rank_zero_only.rank == 0 and (folder / "config.yaml").exists():
        raise ConfigError(f"name: the run {folder} exists; choose another name=, or go on with it by resume={folder}")
    return folder


def write_config(config: DictConfig, folder: Path) -> None:
    """Makes the folder and writes the resolved configuration, from which the run can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    saved.resume = None
    saved.name = folder.name
    OmegaConf.save(saved, folder / "config.yaml")


def write_mixture(folder: Path, report: dict[str, Any]) -> None:
    """mixture.json: what was drawn, left out and cut."""
    (folder / "mixture.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run. Raises ConfigError where there is none."""
    path = folder / "checkpoints" / "last.ckpt"
    if not path.exists():
        raise ConfigError(f"resume: {folder} has no checkpoint checkpoints/last.ckpt; start it anew with another name=")
    return path


def place(config: DictConfig, message: str) -> str:
    """A message that begins with a part of the model, with the file that configures the part before it."""
    part = message.partition(":")[0]
    if part.partition(".")[0] not in config.model:
        return f"experiment {config.experiment}: {message}"
    return f"{origin_of(config, f'model.{part}')}: model.{message}"
