"""The tables of an ablation: on the terminal, as Markdown, and as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from owlfuse.planning.frames import markdown_table, terminal_table
from owlfuse.studies.ablation.progress import console
from owlfuse.studies.ablation.results import COSTS, Results, Row, Score

METRICS_PER_TABLE = 3
"""So many metrics fit into a terminal of 100 columns."""
DIFFERENCE_NOTE = (
    "difference: to the baseline, with a 95% interval of a paired bootstrap over questions (by "
    "picture) and seeds"
)
ONE_SEED = "one seed: the intervals are for these training runs, and say nothing of other seeds"


def notes(results: Results) -> list[str]:
    """Return what a reader of the numbers must know, a line each."""
    lines = [f"baseline: {results.rows[0].name}", DIFFERENCE_NOTE]
    lines.append("±: standard deviation over seeds")
    if max((len(row.finished) for row in results.rows), default=0) == 1:
        lines.append(ONE_SEED)
    # On a GPU it is the allocator's peak, on a CPU that of the process: they are not comparable.
    memory_kinds = {run.results.get("cost", {}).get("peak_memory_of") for run in results.finished}
    memory = ", ".join(sorted(memory_kinds - {None})) or "not measured"
    lines.append(f"peak memory of training: {memory}")
    lines.append(
        "tokens/s: of text, without padding and places of images; time per generated token: one "
        "answer at a time"
    )
    lines += machine_notes(results)
    lines += seed_notes(results)
    if changed := [run.key for run in results.finished if run.other_data]:
        lines.append(
            f"of other data than the ablation's, as accept_changed_data=true accepts: "
            f"{', '.join(changed)}"
        )
    for metric in results.metrics:
        if results.finished and not any(row.scores[metric].values for row in results.rows):
            measured = sorted({name for run in results.finished for name in run.results["metrics"]})
            lines.append(f"no run has measured {metric}; they have {', '.join(measured)}")
    lines += comparison_notes(results)
    if results.unfinished:
        lines.append(
            "not all runs are finished: the differences are over the seeds that both cells have"
        )
    return lines


def machine_notes(results: Results) -> list[str]:
    """Return what makes the runs' times incomparable."""
    lines = []
    jobs = sorted({run.jobs for run in results.finished})
    # Cells that share a machine are not measured as they would be alone.
    if jobs and jobs[-1] > 1:
        count = str(jobs[-1]) if len(jobs) == 1 else " or ".join(map(str, jobs))
        lines.append(
            f"{count} runs at a time shared the machine, which slows each: throughput and times "
            "are of that"
        )
    machines = sorted({run.machine for run in results.finished} - {"-"})
    if len(machines) > 1:
        lines.append(
            f"trained on {len(machines)} machines, whose throughput and times do not compare: "
            f"{'; '.join(machines)}"
        )
    return lines


def seed_notes(results: Results) -> list[str]:
    """Return which intervals are of fewer seeds than others."""
    counts: dict[str, int] = {}
    for row in results.rows:
        for score in row.scores.values():
            if score.difference_interval is not None:
                counts[row.name] = min(score.seeds, counts.get(row.name, score.seeds))
    most = max(counts.values(), default=0)
    lines = []
    if len(counts) > 1:
        lines.append(
            f"each interval is of one comparison: of {len(counts)}, one in twenty leaves 0 out by "
            "chance"
        )
    for seeds in sorted({*counts.values()} - {most}):
        cells = [name for name, count in counts.items() if count == seeds]
        lines.append(
            f"differences over {seeds} of {most} seeds, whose intervals are narrower than they "
            f"would be over all: {', '.join(cells)}"
        )
    return lines


def comparison_notes(results: Results) -> list[str]:
    """Return which differences are of more than the cells."""
    lines = []
    cells = [row.name for row in results.rows if any_other_questions(row)]
    if cells:
        lines.append(
            f"answered other questions than the baseline: {', '.join(cells)}; their differences "
            "are of the questions too, and have no interval"
        )
    single = [metric for metric in results.metrics if is_of_single_cluster(results, metric)]
    if single:
        lines.append(
            f"no intervals of {', '.join(single)}: all its questions are about one picture or of "
            "one chat, and are right or wrong together"
        )
    lines += unfinished_answer_notes(results)
    for words, key in (("trained on", "sources"), ("measured on", "validation")):
        if cells := cells_of_other_samples(results, key):
            lines.append(
                f"{words} other samples than the baseline, since other ones were skipped or cut: "
                f"{', '.join(cells)}"
            )
    precisions = {run.results.get("precision") for run in results.finished} - {None}
    if len(precisions) > 1:
        lines.append(f"the runs were trained in {' and '.join(sorted(map(str, precisions)))}")
    tokenizers = {run.results.get("tokenizer") for run in results.finished} - {None}
    if len(tokenizers) > 1:
        lines.append(
            f"the runs have {len(tokenizers)} tokenizers: losses and perplexities are per token, "
            "and do not compare"
        )
    return lines


def is_of_single_cluster(results: Results, metric: str) -> bool:
    """Return whether a metric's questions are all about one picture, or of one chat."""
    return any(row.scores[metric].single_cluster for row in results.rows)


def unfinished_answer_notes(results: Results) -> list[str]:
    """Return how many answers of each run did not end, which are scored as far as they came."""
    lines = []
    for key in ("answers that did not end", "thoughts that did not end"):
        counts = {run.key: run.count_questions(key) for run in results.finished}
        unfinished = [f"{run} {count}" for run, count in counts.items() if count]
        if unfinished:
            lines.append(f"{key} within evaluation.max_new_tokens: {', '.join(unfinished)}")
    return lines


def cells_of_other_samples(results: Results, key: str) -> list[str]:
    """Return the cells of which a run has skipped or cut other numbers of samples than the
    baseline's of the same seed.

    Args:
        key: `sources` or `validation` of mixture.json.
    """
    expected = {run.seed: run.left_out(key) for run in results.rows[0].finished}
    cells = []
    for row in results.rows[1:]:
        counts = [(run.left_out(key), expected.get(run.seed)) for run in row.finished]
        if any(mine and baseline and mine != baseline for mine, baseline in counts):
            cells.append(row.name)
    return cells


def any_other_questions(row: Row) -> bool:
    """Return whether one of a cell's scores is of other questions than the baseline's."""
    return any(score.other_questions for score in row.scores.values())


def print_tables(results: Results) -> None:
    """Prints scores, then costs, then the runs that do not count; within 100 columns."""
    out = console()
    metrics = results.metrics
    for start in range(0, len(metrics), METRICS_PER_TABLE):
        frame = score_frame(results, metrics[start : start + METRICS_PER_TABLE])
        out.print(terminal_table(frame, results.record["name"], show_lines=True))
    costs = pd.DataFrame([{"cell": row.name, **cost_texts(row)} for row in results.rows])
    out.print(terminal_table(costs, "costs"))
    lines = notes(results) + [f"{run.key}: {run.status}" for run in results.unfinished]
    for line in lines:
        # As it is: rich would color numbers, and read brackets as markup.
        out.print(line, highlight=False, markup=False)


def score_frame(results: Results, metrics: list[str]) -> pd.DataFrame:
    """Return some metrics as texts: mean and deviation, below them the difference."""
    records = []
    for row in results.rows:
        record = {"cell": row.name, "seeds": str(len(row.finished))}
        for metric in metrics:
            score = row.scores[metric]
            # The interval has a line of its own.
            difference = difference_text(score).replace(" [", "\n[")
            head = metric.replace("/", "/\n", 1)  # a long name would widen the column
            record[head] = "\n".join(filter(None, [mean_text(score), difference]))
        records.append(record)
    return pd.DataFrame(records)


def cost_texts(row: Row) -> dict[str, str]:
    """Return the costs of a cell by the titles of their columns."""
    return {cost.head: amount(row.cost(name), cost.scale) for name, cost in COSTS.items()}


def mean_text(score: Score) -> str:
    """Return `0.812 ± 0.014`."""
    if score.mean is None:
        return "-"
    if score.deviation is None:
        return number(score.mean)
    return f"{number(score.mean)} ± {number(score.deviation)}"


def difference_text(score: Score) -> str:
    """Return `+0.031 [+0.011, +0.052]`, and nothing where there is no difference."""
    if score.difference is None:
        return ""
    signed = f"{score.difference:+.3f}"
    if score.difference_interval is None:
        return signed
    low, high = score.difference_interval
    return f"{signed} [{low:+.3f}, {high:+.3f}]"


def number(value: float) -> str:
    """Return a number with three decimals, a large one with one."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def amount(value: float | None, scale: float) -> str:
    """Return 1,129,596 for 1129596, 4,254 for 4253.5 and 2.49 for 2.486."""
    if value is None:
        return "-"
    value *= scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def text_frame(results: Results) -> pd.DataFrame:
    """Return all numbers as texts, a row for each cell.

    A factor has a column of its own where there are several: a single one is the cell's name.
    """
    factors = results.factors if len(results.factors) > 1 else []
    columns = ["cell", *factors, "seeds"]
    for metric in results.metrics:
        columns += [metric, "difference"]  # several columns have that name
    columns += [cost.head for cost in COSTS.values()]
    rows = []
    for row in results.rows:
        texts = [row.name, *(row.levels[factor] for factor in factors)]
        texts.append(f"{len(row.finished)} of {len(row.runs)}")
        for metric in results.metrics:
            score = row.scores[metric]
            # The first row is what all others are compared with.
            difference = "baseline" if row is results.rows[0] else difference_text(score) or "-"
            texts += [mean_text(score), difference]
        rows.append([*texts, *cost_texts(row).values()])
    return pd.DataFrame(rows, columns=columns)


def paper_frame(results: Results) -> pd.DataFrame:
    """Return the paper's numbers beside ours, for the cells that have the level or its name."""
    paper = results.record["paper"]
    records = []
    for name, values in paper["rows"].items():
        # A level may stand in several cells: their mean is shown.
        rows = [row for row in results.rows if name in (row.name, *row.levels.values())]
        record = {"": name, **dict(zip(paper["columns"], (f"{value:g}" for value in values)))}
        for metric in results.metrics:
            means = pd.Series([row.scores[metric].mean for row in rows], dtype=float)
            mean = means.mean()  # of those that are finished
            record[f"ours: {metric}"] = "-" if pd.isna(mean) else number(mean)
        records.append(record)
    return pd.DataFrame(records)


def number_frame(results: Results) -> pd.DataFrame:
    """Return the plain numbers of table.csv, a row for each cell, NaN where there is none."""
    records = []
    for row in results.rows:
        record: dict[str, Any] = {"cell": row.name}
        record |= {factor: row.levels[factor] for factor in results.factors}
        record["seeds"] = len(row.finished)
        for metric in results.metrics:
            score = row.scores[metric]
            low, high = score.interval or (None, None)
            difference_low, difference_high = score.difference_interval or (None, None)
            record |= {
                f"{metric} mean": score.mean,
                f"{metric} sd": score.deviation,
                f"{metric} low": low,
                f"{metric} high": high,
                f"{metric} difference": score.difference,
                f"{metric} difference low": difference_low,
                f"{metric} difference high": difference_high,
            }
        record |= {name: row.cost(name) for name in COSTS}
        records.append(record)
    return pd.DataFrame(records)


def write_tables(results: Results, folder: Path) -> None:
    """Writes table.md and table.csv."""
    record = results.record
    parts = [f"# {record['name']}\n", f"**Question.** {record['question']}\n"]
    parts.append(markdown_table(text_frame(results)))
    if record.get("paper"):
        parts.append(f"In the paper, {record['paper']['title']}:\n")
        parts.append(markdown_table(paper_frame(results)))
    parts.append("".join(f"- {line}\n" for line in notes(results)))
    if results.unfinished:
        parts.append("Runs that do not count:\n")
        parts.append("".join(f"- {run.key}: {run.status}\n" for run in results.unfinished))
    (folder / "table.md").write_text("\n".join(parts), encoding="utf-8")
    number_frame(results).to_csv(folder / "table.csv", index=False)
