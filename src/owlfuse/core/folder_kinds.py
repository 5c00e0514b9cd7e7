"""The kind of a folder, for the error of a command that takes another kind. Imports nothing
heavy."""

from __future__ import annotations

from pathlib import Path

from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_json, read_json_if_there


def describe_path(path: Path) -> str | None:
    """Return the kind of a path and what to do with it, in words that follow its name; None where
    owlfuse knows no such kind."""
    # First, since a checkpoint's folder may hold files of other kinds.
    if (run := run_of_checkpoint(path)) is not None:
        return (
            f"is of the checkpoints of the run {run}; name the run itself (with which=best for "
            "its best checkpoint)"
        )
    if (path / "config.yaml").is_file():
        return (
            f"is a run; owlfuse export {path} OUT exports it, and owlfuse train resume={path} "
            "goes on with it"
        )
    if is_export(path):
        return (
            f"is an exported model and no run; owlfuse eval {path} task=NAME evaluates it, and "
            f"owlfuse train init_from={path} "
            "starts a run from it"
        )
    if (path / "ablation.json").is_file():
        return (
            f"is the folder of an ablation, whose runs are {listed(path)}; owlfuse report "
            f"{path} writes its report"
        )
    if (path / "stages.yaml").is_file():
        return f"is the folder of a recipe, whose stages are the runs {listed(path)}"
    if (path / "ablation.yaml").is_file():
        return f"is where an ablation is written down; owlfuse ablate {path.name} runs it"
    if (path / "recipe.yaml").is_file():
        return f"is where a recipe is written down; owlfuse recipe {path.name} runs it"
    if runs_in(path):
        return f"holds runs and is none; name one of {listed(path)}"
    return None


def run_of_checkpoint(path: Path) -> Path | None:
    """Return the run of a checkpoint, or of a folder of checkpoints."""
    if not path.exists():
        return None
    for folder in (path, path.parent):
        if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
            return folder.parent
    return None


def is_export(path: Path) -> bool:
    """Whether `owlfuse export` or `owlfuse import` wrote the folder."""
    return read_json_if_there(path / "config.json").get("model_type") == "owlfuse"


def runs_in(path: Path) -> list[str]:
    """Return the paths of the runs right below a folder."""
    return sorted(str(file.parent) for file in path.glob("*/config.yaml"))


def listed(path: Path, limit: int = 4) -> str:
    """Return the first of the runs below a folder, for a message."""
    runs = runs_in(path)
    if not runs:
        return "not there yet"
    more = f" and {len(runs) - limit} more" if len(runs) > limit else ""
    return ", ".join(runs[:limit]) + more


def check_exported(folder: Path) -> Path:
    """Return the folder, if `export` wrote it. Raises DataError."""
    folder = Path(folder).expanduser()
    config = folder / "config.json"
    if not config.is_file():
        if kind := describe_path(folder):
            raise DataError(f"{folder} {kind}")
        raise DataError(
            f"{folder} has no config.json; name a folder that `owlfuse export` or `owlfuse "
            "import` wrote"
        )
    model_type = read_json(config, limit=MAX_CONFIG).get("model_type")
    if model_type != "owlfuse":
        raise DataError(
            f"{config} is of a {model_type} model; a released mPLUG-Owl or LLaVA 1.5 is read by "
            f"`owlfuse import {folder} OUT`"
        )
    return folder


def check_released(folder: Path) -> Path:
    """Return the folder, if it may hold a released checkpoint. Raises DataError."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name one with a released config.json and weights")
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder / 'config.json'} is missing; copy it there, a released folder has one"
        )
    return folder
