"""`results.json`: the metrics of a run, with its code, data and machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from owlfuse.artifacts.resume import ANSWERED_BY, learned_changes, samples_changed
from owlfuse.artifacts.run_data import tokenizer_hash
from owlfuse.config.build import to_dict
from owlfuse.config.identity import config_hash, data_hash
from owlfuse.core.environment import git_state, versions
from owlfuse.core.files import read_json, write_json

log = logging.getLogger(__name__)


def write_results(
    folder: Path,
    config: DictConfig,
    steps: int,
    metrics: dict[str, float],
    cost: dict[str, Any],
    wall_s: float,
    record: dict[str, Any],
    questions: dict[str, Any] | None = None,
    checkpoint: str = "last",
) -> None:
    """Writes `results.json` atomically. `hash` identifies code, configuration and data (see
    `config.identity`).

    Args:
        record: the changes, the identity and the code in the run's checkpoints (see
            `artifacts.resume`).
        questions: how many were asked of each validation source and kind.
        checkpoint: the name of the checkpoint that was evaluated.
    """
    plain = to_dict(config)
    changes = record.get("changes", [])
    results = {
        "experiment": config.experiment,
        "seed": config.seed,
        "steps": steps,
        "checkpoint": checkpoint,
        "metrics": metrics,
        "questions": questions or {},
        "cost": cost,
        "hash": {
            "code": record["code"],
            "config": config_hash(plain, learned_changes(changes)),
            # by which an ablation that accepts changed data knows a run that went on with such
            "config_of_keys": config_hash(plain, learned_changes(changes, contents=False)),
            # none of a run from before identities were recorded
            "data": data_hash(record["identity"]) if record.get("identity") else None,
        },
        # another tokenizer makes losses per token incomparable
        "tokenizer": tokenizer_hash(folder),
        "changes": changes,
        # as the machine decided it, where the configuration left it open
        "precision": record.get("precision"),
        "versions": versions(),
        "git": git_state(),
        "wall_s": round(wall_s, 1),
    }
    write_json(folder / "results.json", results)


BEFORE_FILE = "before.json"
BEFORE = "before/"
"""Begins the names of metrics of before the first step."""


def metrics_before(folder: Path) -> dict[str, float]:
    """Returns the metrics of a run before its first step, as `before/<name>`; none where it was not
    evaluated then."""
    path = folder / BEFORE_FILE
    metrics = read_json(path) if path.exists() else {}
    return {f"{BEFORE}{name}": value for name, value in metrics.items()}


def comparable_with_before(
    metrics: dict[str, float], history: list[dict[str, Any]]
) -> dict[str, float]:
    """Returns metrics without those of before the first step where what was asked has changed
    since, and says so.

    Args:
        history: of the run, see `owlfuse.artifacts.resume.Past.changes`.
    """
    kept = {name: value for name, value in metrics.items() if not name.startswith(BEFORE)}
    if len(kept) == len(metrics):
        return metrics
    names = [name for change in history for name in change["changes"]]
    if not samples_changed(names, ANSWERED_BY):
        return metrics
    log.warning(
        "the metrics of before the first step are left out: they are of other questions, or of "
        "answers to other prompts or of another length"
    )
    return kept
