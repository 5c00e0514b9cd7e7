"""`results.json`: the metrics of a run, with the code, the data and the machine that they are
of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from owlfuse.artifacts.resume import learned_changes
from owlfuse.artifacts.run_data import tokenizer_hash
from owlfuse.config.build import to_dict
from owlfuse.config.identity import code_hash, config_hash, data_hash
from owlfuse.core.environment import git_state, versions
from owlfuse.core.files import read_json, write_json


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
    """`results.json`, written beside and renamed. `hash` says of which code, configuration and data
    they are (see `identity`).

    Args:
        record: what the run's checkpoints keep beside its state (see `resume`).
        questions: how many were asked of each validation source and kind.
        checkpoint: whose results these are.
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
            "code": code_hash(plain),
            "config": config_hash(plain, learned_changes(changes)),
            "data": data_hash(record["identity"]) if record.get("identity") else None,
        },
        "tokenizer": tokenizer_hash(folder),
        "changes": changes,
        "versions": versions(),
        "git": git_state(),
        "wall_s": round(wall_s, 1),
    }
    write_json(folder / "results.json", results)


def read_results(folder: Path) -> dict[str, Any]:
    """What `results.json` of a run holds, nothing where there is none yet."""
    path = folder / "results.json"
    return read_json(path) if path.exists() else {}


FILE = "before.json"


def metrics_before(folder: Path) -> dict[str, float]:
    """The metrics of a run before its first step, as `before/<name>`; none where it was not
    evaluated then."""
    path = folder / FILE
    metrics = read_json(path) if path.exists() else {}
    return {f"before/{name}": value for name, value in metrics.items()}
