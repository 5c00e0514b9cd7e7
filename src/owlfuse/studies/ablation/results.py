"""What the runs of an ablation hold: states, metrics, answers; and for each cell its numbers
over seeds.

S seeds, Q questions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.artifacts.runs import BEST
from owlfuse.config.identity import differing_hash
from owlfuse.config.messages import check_name
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, hint
from owlfuse.core.files import parse_json, read_json_if_there
from owlfuse.studies.ablation.launch import STATE_FILE, is_locked
from owlfuse.studies.ablation.statistics import paired_interval


@dataclass(frozen=True)
class Cost:
    """A number of results.json's `cost`, and how tables show it."""

    title: str
    unit: str = ""
    scale: float = 1.0
    """What a number is multiplied by to be in `unit`."""

    @property
    def head(self) -> str:
        """The title of its column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


COSTS = {
    "trained_parameters": Cost("parameters trained"),
    "tokens_per_s": Cost("training throughput", "tokens/s"),
    "peak_memory_bytes": Cost("peak memory", "MB", 1e-6),
    "ms_per_generated_token": Cost("time per generated token", "ms"),
}
SHARE_METRICS = ("exact_match", "contains")
"""Metrics that are shares of right answers in answers.jsonl
(`owlfuse.evaluation.metrics.score`): they have intervals."""
Question = tuple[str, str, int]
"""The id of a chat, the question, and how often that came before."""
RunAnswers = dict[Question, dict[str, Any]]
"""The lines of answers.jsonl by question."""


@dataclass
class Run:
    """A cell under one seed. `state` is finished, failed, interrupted, running, not begun, missing,
    or of other code, configuration or data."""

    key: str
    cell: str
    seed: int
    folder: Path
    state: str
    detail: str = ""
    """Of a run that is not finished: why, or how far it is."""
    results: dict[str, Any] = field(default_factory=dict)
    other_data: bool = False
    """Whether it counts by `accept_changed_data=true`: its data are not the cell's."""
    machine: str = "-"
    """On which it was trained."""
    jobs: int = 1
    """How many runs at a time shared that machine."""

    @property
    def finished(self) -> bool:
        """Whether the run counts."""
        return self.state == "finished"

    @property
    def status(self) -> str:
        """The state with its detail, as reports show it."""
        return f"{self.state}, {self.detail}" if self.detail else self.state

    def count_questions(self, key: str) -> int:
        """Return a count of results.json's questions, over the validation sources."""
        questions = self.results.get("questions") or {}
        return sum(counts.get(key, 0) for counts in questions.values())

    def left_out(self, key: str) -> dict[str, tuple[int, int]]:
        """Return by source how many samples were skipped and cut, nothing of a run without a
        mixture.json.

        Args:
            key: `sources`, of the training, or `validation`.
        """
        path = self.folder / "mixture.json"
        mixture = read_json_if_there(path)
        try:
            if key == "validation":
                mixture = mixture.get("validation") or {}
            sources = mixture.get("sources") or {}
            return {name: (row["skipped"], row["truncated"]) for name, row in sources.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not as owlfuse writes it") from error

    def answers(self, source: str, kind: str = "") -> RunAnswers:
        """Return the answers in answers.jsonl of one validation source and kind of question."""
        answers: RunAnswers = {}
        repeats: Counter[tuple[str, str]] = Counter()
        path = self.folder / "answers.jsonl"
        if not path.exists():
            return answers
        # As bytes, whose lines end at line feeds alone: an answer may hold U+2028.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                answer = parse_json(line, f"{path}: line {number}")
                if answer["source"] == source and kind in ("", answer["kind"]):
                    question = answer["id"], answer["question"]
                    # A chat may ask the same question twice.
                    answers[(*question, repeats[question])] = answer
                    repeats[question] += 1
        return answers


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
    other_questions: bool = False
    """Whether runs answered other questions than the baseline's: the difference is of both."""
    single_cluster: bool = False
    """Whether all questions are about one picture, or of one chat: nothing can be resampled."""
    seeds: int = 0
    """In the difference."""

    @property
    def mean(self) -> float | None:
        """The mean over seeds."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for fewer than two."""
        if len(self.values) < 2:
            return None
        return float(np.std(list(self.values.values()), ddof=1))  # of a sample of seeds


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
        """Return the mean of a cost over seeds, in the unit of results.json."""
        costs = [run.results.get("cost", {}).get(name) for run in self.finished]
        values = [cost for cost in costs if cost is not None]
        return float(np.mean(values)) if values else None


@dataclass
class Results:
    """All that a report shows."""

    record: dict[str, Any]
    """The content of ablation.json."""
    rows: list[Row]
    """The baseline first."""

    @property
    def metrics(self) -> list[str]:
        """The metrics by their names in results.json; the first is the score of the plots."""
        return list(self.record["metrics"])

    @property
    def factors(self) -> list[str]:
        """The names of what is varied."""
        return list(self.record["factors"])

    @property
    def runs(self) -> list[Run]:
        """The runs of all cells."""
        return [run for row in self.rows for run in row.runs]

    @property
    def finished(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.finished]

    @property
    def unfinished(self) -> list[Run]:
        """The runs that do not count."""
        return [run for run in self.runs if not run.finished]


def load(folder: Path, baseline: str | None = None) -> Results:
    """Return the results in an ablation's folder, finished or not.

    Raises:
        ConfigError: the folder is no ablation's, or has no cell `baseline`.
        DataError: its files are not as owlfuse writes them.
    """
    record = read_json_if_there(folder / "ablation.json")
    if not record:
        raise ConfigError(
            f"{COMMAND_LINE}: {folder}: not an ablation's folder: there is no ablation.json in it"
        )
    try:
        return results_of(folder, record, baseline)
    # The form of foreign files is not checked key by key.
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: ablation.json and results are not as owlfuse writes them: {error!r}"
        ) from error


def results_of(folder: Path, record: dict[str, Any], baseline: str | None) -> Results:
    """Return the results that belong to a record. Raises as `load`, and what a record of another
    form raises."""
    rows: dict[str, Row] = {}
    for cell in record["cells"]:
        name = cell["cell"]
        if name not in rows:
            rows[name] = Row(name, cell["levels"], [], cell["config"])
        # The record may come from elsewhere: a key must not lead out of the folder.
        check_name(f"{folder / 'ablation.json'}: cell", cell["key"])
        rows[name].runs.append(read_run(folder / cell["key"], cell, record))
    baseline_row = rows.get(record["baseline"] if baseline is None else baseline)
    if baseline_row is None:
        raise ConfigError(
            f"{COMMAND_LINE}: baseline={baseline}: no such cell{hint(str(baseline), rows)}"
        )
    for row in rows.values():
        for metric, (source, local_name) in record["metrics"].items():
            row.scores[metric] = score(row, baseline_row, metric, source, local_name)
    # A stable sort: behind the baseline the cells stand as in the file.
    return Results(record, sorted(rows.values(), key=lambda row: row is not baseline_row))


def read_run(folder: Path, cell: dict[str, Any], record: dict[str, Any]) -> Run:
    """Return a run with its state. Results of other code or another configuration are not read."""
    run = Run(cell["key"], cell["cell"], cell["seed"], folder, "missing")
    results = read_json_if_there(folder / "results.json")
    state = read_json_if_there(folder / STATE_FILE)
    # An older release wrote both for the whole ablation.
    run.machine = state.get("machine", record.get("machine", "-"))
    run.jobs = state.get("jobs", record.get("jobs", 1))
    step = read_json_if_there(folder / "progress.json").get("step", 0)
    half_way = of_stopped_run(results, state, cell["steps"])
    if results and not half_way:
        accept_data = bool(cell["config"].get("accept_changed_data"))
        kind = differing_hash(results.get("hash") or {}, cell["hash"], accept_data)
        if kind is None and results.get("checkpoint") == BEST:
            # The other cells have the results of their last.
            run.state = "of another checkpoint"
            run.detail = (
                f"its results are of {BEST}; it is not counted; for those of the last: owlfuse "
                f"eval {folder} which=last"
            )
        elif kind is None:
            run.state, run.results = "finished", results
            run.other_data = differing_hash(results["hash"], cell["hash"], False) is not None
        else:
            name = "configuration" if kind == "config" else kind
            run.state = f"of other {name}"
            run.detail = f"its {name} is not that of the ablation; it is not counted"
        return run

    if not state:
        return run
    if state["state"] != "finished":
        run.state = state["state"]
    # A process that was killed leaves `running` behind, but its lock is free. Before a cell takes
    # its lock, the command has one.
    if run.state == "running":
        locked = is_locked(folder / ".lock") or is_locked(folder.parent / ".lock")
        if not locked:
            run.state = "interrupted"  # killed, with no time to say so
    run.detail = state.get("error", "")
    if run.state in ("running", "interrupted"):
        run.detail = f"at step {step:,} of {cell['steps']:,}"
    if half_way and run.state != "running":
        run.detail += (
            f"; its results are of step {results['steps']:,} and are not counted; owlfuse ablate "
            "goes on with it"
        )
    return run


def of_stopped_run(results: dict[str, Any], state: dict[str, Any], steps: int) -> bool:
    """Return whether results are those that `owlfuse eval` wrote of a cell that was stopped.

    A training that ends writes its own, which are of "last", also where a callback ends it early.
    """
    evaluated_later = results.get("checkpoint", "last") != "last"
    return evaluated_later and state.get("state") != "finished" and results.get("steps") != steps


def score(row: Row, baseline: Row, metric: str, source: str, local_name: str) -> Score:
    """Return a metric's values by seed, with the intervals that single answers give.

    Args:
        local_name: of the metric within its validation source.
    """
    runs = runs_with_metric(row, metric)
    baseline_runs = runs_with_metric(baseline, metric)
    result = Score({seed: run.results["metrics"][metric] for seed, run in runs.items()})
    name, _, kind = local_name.partition("/")
    has_answers = name in SHARE_METRICS
    if has_answers and runs:
        matrix, clusters = right_matrix([run.answers(source, kind) for run in runs.values()])
        if matrix is not None:
            result.interval = paired_interval(matrix, clusters)
            result.single_cluster = result.interval is None

    # Paired by seed: what a seed does to both cells cancels out.
    shared_seeds = [seed for seed in runs if seed in baseline_runs]
    if row is baseline or not shared_seeds:
        return result
    result.seeds = len(shared_seeds)
    differences = []
    answers = []
    for seed in shared_seeds:
        pair = runs[seed], baseline_runs[seed]
        value, baseline_value = (run.results["metrics"][metric] for run in pair)
        differences.append(value - baseline_value)
        answers += [run.answers(source, kind) for run in pair]
    result.difference = float(np.mean(differences))
    if has_answers:
        matrix, clusters = right_matrix(answers)
        result.other_questions = matrix is None and any(answers)
        if matrix is not None:
            # Rows alternate between the cell and the baseline.
            result.difference_interval = paired_interval(matrix[0::2] - matrix[1::2], clusters)
    return result


def runs_with_metric(row: Row, metric: str) -> dict[int, Run]:
    """Return the finished runs that have the metric, by seed."""
    return {run.seed: run for run in row.finished if metric in run.results["metrics"]}


def right_matrix(
    answers: list[RunAnswers],
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return 1 where an answer is right, (S, Q), and the cluster of each question: its picture or
    video, or else its chat. None where the runs did not answer the same questions."""
    questions = list(answers[0])
    same_questions = all(set(run_answers) == set(questions) for run_answers in answers)
    if not questions or not same_questions:
        return None, np.zeros(0, int)
    matrix = np.zeros((len(answers), len(questions)))
    for index, run_answers in enumerate(answers):
        matrix[index] = [run_answers[question]["right"] for question in questions]
    # Questions of one picture are right or wrong together: they are resampled together.
    names = []
    for question in questions:
        chat = question[0].rpartition("#")[0] or question[0]
        answer = answers[0][question]
        # A picture of bytes has no path; the answers of an older release have fewer keys.
        keys = ("image", "image_hash", "video", "video_hash")
        shown = [answer[key] for key in keys if answer.get(key)]
        names.append(shown[0] if shown else chat)
    return matrix, np.unique(names, return_inverse=True)[1]
