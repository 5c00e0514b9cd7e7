"""What the runs of an ablation hold: states, metrics, answers; and for each cell its numbers
over seeds."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.config.identity import differing_hash
from owlfuse.config.messages import check_name
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, hint
from owlfuse.core.files import read_json_if_there
from owlfuse.studies.ablation.launch import STATE
from owlfuse.studies.ablation.statistics import paired_interval

COSTS = {
    "trained_parameters": ("parameters trained", ""),
    "tokens_per_s": ("training throughput", "tokens/s"),
    "peak_memory_bytes": ("peak memory", "MB"),
    "ms_per_generated_token": ("time per generated token", "ms"),
}
"""By their names in results.json: what they are, and their unit in tables (bytes are shown as MB
of 10^6)."""

SHARES = ("exact_match", "contains")
"""Metrics that are shares of right answers in answers.jsonl
(`owlfuse.evaluation.metrics.score`): they have intervals."""


@dataclass
class Run:
    """A cell under one seed. `state` is finished, failed, interrupted, running, not begun, missing,
    or of other code, configuration or data."""

    key: str
    cell: str
    seed: int
    folder: Path
    steps: int
    state: str
    said: str = ""
    """Of a run that is not finished: why, or how far it is."""
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it counts."""
        return self.state == "finished"

    @property
    def why(self) -> str:
        """`said` after a comma."""
        return f", {self.said}" if self.said else ""

    def answers(self, source: str, kind: str = "") -> dict[tuple[str, str, int], dict[str, Any]]:
        """answers.jsonl by (id, question, how often it came before), of one validation source
        and kind of question."""
        found: dict[tuple[str, str, int], dict[str, Any]] = {}
        seen: Counter[tuple[str, str]] = Counter()
        path = self.folder / "answers.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            answer = json.loads(line)
            if answer["source"] == source and kind in ("", answer["kind"]):
                question = answer["id"], answer["question"]
                found[(*question, seen[question])] = answer
                seen[question] += 1
        return found


@dataclass
class Score:
    """One metric of one cell."""

    values: dict[int, float]
    """By seed."""
    interval: tuple[float, float] | None = None
    """Of the mean, over questions and seeds."""
    difference: float | None = None
    """To the baseline, over the seeds that both have."""
    difference_interval: tuple[float, float] | None = None
    seeds: int = 0
    """In the difference."""

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None


@dataclass
class Row:
    """One cell over its seeds."""

    name: str
    levels: dict[str, str]
    runs: list[Run]
    config: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def finished(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.finished]

    def cost(self, name: str) -> float | None:
        """Its mean over seeds, in the unit of COSTS."""
        values = [run.results.get("cost", {}).get(name) for run in self.finished]
        values = [value for value in values if value is not None]
        scale = 1e-6 if name.endswith("_bytes") else 1.0
        return float(np.mean(values)) * scale if values else None


@dataclass
class Results:
    """All that a report says."""

    folder: Path
    record: dict[str, Any]
    rows: list[Row]
    """The baseline first."""

    @property
    def metrics(self) -> list[str]:
        """By their names in results.json; the first is the score of the plots."""
        return list(self.record["metrics"])

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [run for row in self.rows for run in row.runs]


def load(folder: Path, baseline: str | None = None) -> Results:
    """Reads an ablation's folder, finished or not.

    Raises ConfigError where it is none, or has no cell `baseline`.
    """
    record = read_json_if_there(folder / "ablation.json")
    if not record:
        raise ConfigError(
            f"{COMMAND_LINE}: {folder}: not an ablation's folder: there is no ablation.json in it"
        )
    try:
        return results_of(folder, record, baseline)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: ablation.json and results are not as owlfuse writes them: {error!r}"
        ) from error


def results_of(folder: Path, record: dict[str, Any], baseline: str | None) -> Results:
    """What `load` reads, of the record in ablation.json.

    Raises ConfigError, and what a record of another form raises.
    """
    rows: dict[str, Row] = {}
    for cell in record["cells"]:
        row = rows.setdefault(cell["cell"], Row(cell["cell"], cell["levels"], [], cell["config"]))
        check_name(f"{folder / 'ablation.json'}: cell", cell["key"])
        row.runs.append(read_run(folder / cell["key"], cell))
    base = rows.get(record["baseline"] if baseline is None else baseline)
    if base is None:
        raise ConfigError(
            f"{COMMAND_LINE}: baseline={baseline}: no such cell{hint(str(baseline), rows)}"
        )
    for row in rows.values():
        for metric, (source, own) in record["metrics"].items():
            row.scores[metric] = score(row, base, metric, source, own)
    return Results(folder, record, sorted(rows.values(), key=lambda row: row is not base))


def read_run(folder: Path, cell: dict[str, Any]) -> Run:
    """A run and its state. Results of other code or another configuration are not read."""
    run = Run(cell["key"], cell["cell"], cell["seed"], folder, cell["steps"], "missing")
    results, state = read_json_if_there(folder / "results.json"), read_json_if_there(folder / STATE)
    step = read_json_if_there(folder / "progress.json").get("step", 0)
    if results:
        accepted = bool(cell["config"].get("accept_changed_data"))
        what = differing_hash(results.get("hash") or {}, cell["hash"], accepted)
        if what is None:
            run.state, run.results = "finished", results
        else:
            names = {"config": "configuration", "code": "code", "data": "data"}
            run.state = f"of other {names[what]}"
            run.said = f"its {names[what]} is not that of the ablation; it is not counted"
    elif state:
        run.state = state["state"] if state["state"] != "finished" else "missing"
        if run.state == "running" and not any(
            held(path / ".lock") for path in (folder, folder.parent)
        ):
            run.state = "interrupted"  # killed, with no time to say so
        run.said = state.get("error", "")
        if run.state in ("running", "interrupted"):
            run.said = f"at step {step:,} of {cell['steps']:,}"
    return run


def held(lock: Path) -> bool:
    """Whether a process has the lock."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def score(row: Row, base: Row, metric: str, source: str, own: str) -> Score:
    """Values by seed, and what the answers to the single questions say of intervals."""
    values = {
        run.seed: run.results["metrics"][metric]
        for run in row.finished
        if metric in run.results["metrics"]
    }
    found = Score(values)
    others = {run.seed: run for run in base.finished if metric in run.results["metrics"]}
    mine = {run.seed: run for run in row.finished if run.seed in values}
    name, _, kind = own.partition("/")
    if name in SHARES and mine:
        matrix, clusters = right_matrix([run.answers(source, kind) for run in mine.values()])
        found.interval = paired_interval(matrix, clusters) if matrix is not None else None
    shared = [seed for seed in mine if seed in others]
    if row is base or not shared:
        return found
    found.seeds = len(shared)
    found.difference = float(
        np.mean([values[seed] - others[seed].results["metrics"][metric] for seed in shared])
    )
    if name in SHARES:
        asked = [run.answers(source, kind) for seed in shared for run in (mine[seed], others[seed])]
        matrix, clusters = right_matrix(asked)
        if matrix is not None:
            found.difference_interval = paired_interval(matrix[0::2] - matrix[1::2], clusters)
    return found


def right_matrix(
    asked: list[dict[tuple[str, str, int], dict[str, Any]]],
) -> tuple[np.ndarray | None, np.ndarray]:
    """1 where an answer is right, (runs, Q), and the cluster of each question: its picture, or else
    its chat. None where the runs did not answer the same questions."""
    questions = list(asked[0])
    if not questions or any(set(one) != set(questions) for one in asked):
        return None, np.zeros(0, int)
    matrix = np.array(
        [[one[question]["right"] for question in questions] for one in asked], dtype=float
    )
    names = [
        asked[0][question]["image"] or question[0].rpartition("#")[0] or question[0]
        for question in questions
    ]
    return matrix, np.unique(names, return_inverse=True)[1]
