"""The results of a benchmark and the settings that made them: the table and tasks/<name>.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from owlfuse.artifacts.identity import ANSWER_FILES, model_files
from owlfuse.artifacts.run_data import tokenizer_files
from owlfuse.config.identity import code_hash
from owlfuse.config.trust import read_run_config
from owlfuse.core.console import PlainConsole
from owlfuse.core.environment import git_state, versions
from owlfuse.core.files import files_of, fingerprint, read_json
from owlfuse.core.types import without_keys
from owlfuse.evaluation.benchmarks.base import Task

ANSWERING = "owlfuse.evaluation.benchmarks.answering"
"""The module whose imports make an answer."""
MAX_LISTED_SKIPS = 10
"""Skipped records whose reasons are written."""


def model_fingerprint(model_dir: Path, checkpoint: Path | None) -> tuple[str, str]:
    """Returns a hash of a model's weights, configuration and tokenizer, and their origin in words.

    Args:
        checkpoint: of a run; None for an exported folder.
    """
    if checkpoint is not None:
        # frozen weights are in no checkpoint: config.yaml says what they are made of
        files = [model_dir / "config.yaml", *files_of(checkpoint).values()]
        return fingerprint([*files, *tokenizer_files(model_dir)]), checkpoint.name
    return fingerprint(model_files(model_dir, ANSWER_FILES)), "exported or imported"


def configuration_of(model_dir: Path) -> dict[str, Any]:
    """Return what names the parts of a run or of an exported folder."""
    if (model_dir / "config.yaml").is_file():
        return read_run_config(model_dir)
    return read_json(model_dir / "config.json")


def settings_of(
    model_dir: Path, checkpoint: Path | None, task: Task, dtype: str, thinking: bool
) -> dict[str, Any]:
    """Returns all that an answer depends on: `weights`, a hash of the model's files, `data`, a hash
    of the benchmark's, `task`, its other fields, and so on; and `key`, 16 hexadecimal digits that
    change where an answer may.

    Args:
        checkpoint: of a run; None for an exported folder.
    """
    weights, origin = model_fingerprint(model_dir, checkpoint)
    data = task.fingerprint()
    options: dict[str, Any] = {"_target_": f"{type(task).__module__}.{type(task).__qualname__}"}
    for field in fields(task):
        value = getattr(task, field.name)
        if field.name not in (*task.file_fields, *task.unhashed_fields):
            options[field.name] = str(value) if isinstance(value, Path) else value
    # the same folder by another path has the same pictures
    root = str(Path(options["image_root"]).resolve())
    # other code, of owlfuse or the user's own parts, may write another prompt or another answer
    made_by = code_hash(configuration_of(model_dir), ANSWERING)
    content = [weights, data, {**options, "image_root": root}, dtype, thinking, made_by]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {
        "model": str(model_dir),
        "checkpoint": origin,
        "weights": weights,
        "files": [str(file) for file in task.files()],
        "data": data,
        "task": options,
        "dtype": dtype,
        "thinking": thinking,
        "key": digest[:16],
    }


def results_of(
    name: str,
    metrics: dict[str, float],
    counts: dict[str, int],
    skipped: list[tuple[str, str]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Returns the content of `tasks/<name>.json`.

    Args:
        counts: of questions.
        skipped: records and reasons.
        settings: see `settings_of`, and further options, which change no answer.
    """
    listed_skips = []
    for record, reason in skipped[:MAX_LISTED_SKIPS]:
        listed_skips.append({"record": record, "reason": reason})
    # their versions may change a score
    scorers = [package for package in ("torchmetrics", "pycocoevalcap") if find_spec(package)]
    return {
        "task": name,
        "metrics": metrics,
        "counts": counts,
        "skipped": listed_skips,
        "settings": settings,
        "versions": {**versions(), **{package: version(package) for package in scorers}},
        "git": git_state(),
    }


def print_results(results: dict[str, Any]) -> None:
    """Prints one metric a line, below them the settings that made them, and what was skipped."""
    settings = results["settings"]
    table = Table(title=f"{results['task']}: {settings['model']}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for metric, number in results["metrics"].items():
        table.add_row(metric, f"{number:,}" if isinstance(number, int) else f"{number:.4f}")
    made_by = Table(title="made by", title_justify="left", show_header=False)
    made_by.add_column()
    made_by.add_column(overflow="fold")
    rows = {
        "weights": f"{settings['checkpoint']}, {settings['dtype']}",
        "files": ", ".join(settings["files"]),
        **settings["task"],
    }
    # hashes are for the file alone, and the others are in the title and the rows above
    in_other_rows = ("model", "checkpoint", "weights", "files", "data", "task", "dtype")
    rows |= without_keys(settings, in_other_rows)
    rows |= results["counts"]
    for key, value in rows.items():
        if value is not None:
            has_lines = isinstance(value, str) and "\n" in value
            made_by.add_row(key, repr(value) if has_lines else str(value))
    console = PlainConsole()
    console.print(table)
    console.print(made_by)
    if settings["dtype"] != "float32":
        console.print(
            "weights below float32 round by the batch: another batch_size may give another "
            "answer here and there",
            soft_wrap=True,
        )
    for skip in results["skipped"]:
        console.print(f"skipped {skip['record']}: {skip['reason']}", soft_wrap=True)
