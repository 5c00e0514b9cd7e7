"""What made the results, and how they are told: the table and tasks/<name>.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from owlfuse.artifacts.load import ADAPTER
from owlfuse.artifacts.run_data import tokenizer_files
from owlfuse.artifacts.runs import check_which, chosen_checkpoint
from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.environment import git_state, versions
from owlfuse.core.files import files_of, fingerprint
from owlfuse.evaluation.benchmarks.base import Task

ASIDE = ("file", "on_error", "max_skips", "annotations", "splits")
"""Fields of a benchmark that say where its files lie, which are known by their contents, or
change no answer."""
TOLD = 10
"""Skipped records whose reasons are written."""


def weights_of(place: Path, which: str) -> tuple[str, str]:
    """What a model's weights, configuration and tokenizer are known by, and where they are from,
    in words."""
    if (place / "config.yaml").is_file():
        checkpoint = chosen_checkpoint(place, which)
        files = [place / "config.yaml", *files_of(checkpoint).values(), *tokenizer_files(place)]
        return fingerprint(files), checkpoint.name
    check_which(which, of_run=False)
    kinds = (
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        f"{ADAPTER}/*.safetensors",
        f"{ADAPTER}/*.json",
    )
    return fingerprint(
        sorted(file for kind in kinds for file in place.glob(kind))
    ), "exported or imported"


@dataclass
class Settings:
    """What an answer depends on."""

    model: str
    checkpoint: str
    weights: str
    """What the model's files are known by (see `data.files.fingerprint`)."""
    files: list[str]
    data: str
    """What the benchmark's files are known by."""
    task: dict[str, Any]
    """The benchmark's other fields."""
    dtype: str
    thinking: bool

    @classmethod
    def of(
        cls, place: Path, task: Task, dtype: str, thinking: bool = False, which: str = "last"
    ) -> Settings:
        """Of a model's folder and a benchmark."""
        weights, checkpoint = weights_of(place, which)
        fields = {k: v for k, v in vars(task).items() if k in type(task).__dataclass_fields__}
        plain = {
            k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k not in ASIDE
        }
        target = f"{type(task).__module__}.{type(task).__qualname__}"
        files = [str(file) for file in task.files()]
        return cls(
            str(place),
            checkpoint,
            weights,
            files,
            task.fingerprint(),
            {"_target_": target, **plain},
            dtype,
            thinking,
        )

    @property
    def key(self) -> str:
        """16 hexadecimal digits that are others where an answer may be."""
        root = str(Path(self.task["image_root"]).resolve())
        content = [
            self.weights,
            self.data,
            {**self.task, "image_root": root},
            self.dtype,
            self.thinking,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def results_of(
    name: str,
    metrics: dict[str, float],
    counts: dict[str, int],
    skipped: list[tuple[str, str]],
    settings: Settings,
    how: dict[str, Any],
) -> dict[str, Any]:
    """What `tasks/<name>.json` holds.

    Args:
        counts: of questions.
        skipped: records and reasons.
        how: what was asked for beside the settings, and changes no answer.
    """
    scorers = [package for package in ("torchmetrics", "pycocoevalcap") if find_spec(package)]
    return {
        "task": name,
        "metrics": metrics,
        "counts": counts,
        "skipped": [{"record": record, "reason": reason} for record, reason in skipped[:TOLD]],
        "settings": {**vars(settings), "key": settings.key, **how},
        "versions": {**versions(), **{package: version(package) for package in scorers}},
        "git": git_state(),
    }


def print_results(results: dict[str, Any]) -> None:
    """One metric a line, below them the settings that made them, and what was skipped."""
    settings = results["settings"]
    table = Table(title=f"{results['task']}: {settings['model']}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for metric, number in results["metrics"].items():
        table.add_row(metric, f"{number:,}" if isinstance(number, int) else f"{number:.4f}")
    made = Table(title="made by", title_justify="left", show_header=False)
    made.add_column()
    made.add_column(overflow="fold")
    weights = f"{settings['checkpoint']}, {settings['dtype']}"
    apart = ("model", "checkpoint", "weights", "files", "data", "task", "dtype")
    rows = {"weights": weights, "files": ", ".join(settings["files"]), **settings["task"]}
    rows |= {key: found for key, found in settings.items() if key not in apart} | results["counts"]
    for key, found in rows.items():
        if found is not None:
            made.add_row(
                key, repr(found) if isinstance(found, str) and "\n" in found else str(found)
            )
    console = Console()
    console.print(table)
    console.print(made)
    if settings["dtype"] != "float32":
        told = (
            "weights below float32 round by the batch: another batch_size may give another "
            "answer here and there"
        )
        console.print(told, soft_wrap=True)
    for one in results["skipped"]:
        console.print(f"skipped {one['record']}: {one['reason']}", markup=False, soft_wrap=True)
