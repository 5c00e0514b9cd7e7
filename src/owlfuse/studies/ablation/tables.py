"""The table of an ablation: on the terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

from rich.table import Table

from owlfuse.studies.ablation.progress import console
from owlfuse.studies.ablation.results import COSTS, Results, Row, Score

NOTE = (
    "difference: to the baseline, with a 95% interval of a paired bootstrap over questions (by "
    "picture) and seeds"
)
ONE_SEED = "one seed: the intervals are for these training runs, and say nothing of other seeds"


def notes(results: Results) -> list[str]:
    """What a reader of the numbers must know."""
    said = [f"baseline: {results.rows[0].name}", NOTE, "±: standard deviation over seeds"]
    if max((len(row.finished) for row in results.rows), default=0) == 1:
        said.append(ONE_SEED)
    kinds = {
        run.results.get("cost", {}).get("peak_memory_of") for run in results.runs if run.finished
    } - {None}
    said.append(f"peak memory of training: {', '.join(sorted(kinds)) or 'not measured'}")
    said.append(
        "tokens/s: of text, without padding and places of images; time per generated token: one "
        "answer at a time"
    )
    if results.record.get("jobs", 1) > 1:
        said.append(
            f"{results.record['jobs']} runs at a time shared the machine, which slows each: "
            "throughput and times are of that"
        )
    if any(len(row.finished) < len(row.runs) for row in results.rows):
        said.append(
            "not all runs are finished: the differences are over the seeds that both cells have"
        )
    return said


def print_tables(results: Results) -> None:
    """Scores, three metrics at a time, then costs, then the runs that do not count; within 100
    columns."""
    out = console()
    metrics = results.metrics
    for start in range(0, len(metrics), 3):
        table = Table(title=results.record["name"], title_justify="left", show_lines=True)
        table.add_column("cell", overflow="fold", max_width=26)
        table.add_column("seeds", justify="right")
        for metric in metrics[start : start + 3]:
            table.add_column(metric.replace("/", "/\n", 1), justify="right", overflow="fold")
        for row in results.rows:
            table.add_row(
                row.name,
                str(len(row.finished)),
                *(cell_text(row, metric) for metric in metrics[start : start + 3]),
            )
        out.print(table)
    table = Table(title="costs", title_justify="left")
    table.add_column("cell", overflow="fold", max_width=36)
    for what, unit in COSTS.values():
        table.add_column(f"{what}, {unit}" if unit else what, justify="right", overflow="fold")
    for row in results.rows:
        table.add_row(row.name, *(amount(row.cost(name)) for name in COSTS))
    out.print(table)
    for line in notes(results):
        out.print(line, highlight=False, markup=False)
    for run in results.runs:
        if not run.finished:
            out.print(f"{run.key}: {run.state}{run.why}", highlight=False, markup=False)


def cell_text(row: Row, metric: str) -> str:
    """Mean and deviation, and below them the difference."""
    found = row.scores[metric]
    difference = difference_text(found).replace(" [", "\n[")  # the interval has a line of its own
    return "\n".join(line for line in (mean_text(found), difference) if line)


def mean_text(score: Score) -> str:
    """0.812 ± 0.014."""
    if score.mean is None:
        return "-"
    return (
        f"{number(score.mean)} ± {number(score.deviation)}"
        if score.deviation is not None
        else number(score.mean)
    )


def difference_text(score: Score) -> str:
    """+0.031 [+0.011, +0.052]."""
    if score.difference is None:
        return ""
    signed = f"{score.difference:+.3f}"
    if score.difference_interval is None:
        return signed
    low, high = score.difference_interval
    return f"{signed} [{low:+.3f}, {high:+.3f}]"


def number(value: float) -> str:
    """Three places; large ones fewer."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def amount(value: float | None) -> str:
    """1129596 -> 1,129,596; 4253.5 -> 4,254; 2.486 -> 2.49."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def factors_shown(results: Results) -> list[str]:
    """The factors with a column of their own: a single one is the cell's name."""
    factors = list(results.record["factors"])
    return factors if len(factors) > 1 else []


def heads(results: Results) -> list[str]:
    """The columns of the Markdown and HTML tables."""
    factors = factors_shown(results)
    metrics = [head for metric in results.metrics for head in (metric, "difference")]
    return [
        "cell",
        *factors,
        "seeds",
        *metrics,
        *(f"{what}, {unit}" if unit else what for what, unit in COSTS.values()),
    ]


def cells_of(results: Results, row: Row) -> list[str]:
    """A row of them."""
    scores = [row.scores[metric] for metric in results.metrics]
    base = row is results.rows[0]
    texts = [
        text
        for score in scores
        for text in (mean_text(score), "baseline" if base else difference_text(score) or "-")
    ]
    levels = [row.levels[factor] for factor in factors_shown(results)]
    return [
        row.name,
        *levels,
        f"{len(row.finished)} of {len(row.runs)}",
        *texts,
        *(amount(row.cost(name)) for name in COSTS),
    ]


def markdown(results: Results) -> str:
    """table.md: the question, the table, the paper's, the notes, and the runs that do not count."""
    lines = [f"# {results.record['name']}", "", f"**Question.** {results.record['question']}", ""]
    head = heads(results)
    lines += markdown_table(head, [cells_of(results, row) for row in results.rows]) + [""]
    if results.record.get("paper"):
        title, paper_head, rows = paper_table(results)
        lines += [f"In the paper, {title}:", "", *markdown_table(paper_head, rows), ""]
    lines += [f"- {line}" for line in notes(results)]
    left = [run for run in results.runs if not run.finished]
    lines += ["", "Runs that do not count:", ""] if left else []
    lines += [f"- {run.key}: {run.state}{run.why}" for run in left]
    return "\n".join(lines) + "\n"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; a bar in a text is escaped."""
    body = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in body]


def paper_table(results: Results) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: the paper's numbers beside ours for the cells that have the
    level, or are the cell."""
    paper, rows = results.record["paper"], []
    metrics = results.metrics
    for name, numbers in paper["rows"].items():
        mine = [row for row in results.rows if name in (row.name, *row.levels.values())]
        ours = []
        for metric in metrics:
            means = [mean for row in mine if (mean := row.scores[metric].mean) is not None]
            ours.append(number(sum(means) / len(means)) if means else "-")
        rows.append([name, *(f"{value:g}" for value in numbers), *ours])
    return paper["title"], ["", *paper["columns"], *(f"ours: {metric}" for metric in metrics)], rows


def csv_text(results: Results) -> str:
    """table.csv: a line a cell, plain numbers, empty where there is none."""
    file = StringIO()
    factors = list(results.record["factors"])
    head = ["cell", *factors, "seeds"]
    for metric in results.metrics:
        head += [
            f"{metric} {part}"
            for part in (
                "mean",
                "sd",
                "low",
                "high",
                "difference",
                "difference low",
                "difference high",
            )
        ]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head, *COSTS])
    for row in results.rows:
        line: list[object] = [
            row.name,
            *(row.levels[factor] for factor in factors),
            len(row.finished),
        ]
        for metric in results.metrics:
            found = row.scores[metric]
            line += [found.mean, found.deviation, *(found.interval or (None, None))]
            line += [found.difference, *(found.difference_interval or (None, None))]
        costs = [row.cost(name) for name in COSTS]
        scaled = [
            c * 1e6 if c is not None and name.endswith("_bytes") else c
            for c, name in zip(costs, COSTS)
        ]
        writer.writerow(["" if value is None else value for value in [*line, *scaled]])
    return file.getvalue()


def write_tables(results: Results, folder: Path) -> None:
    """table.md and table.csv."""
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    (folder / "table.csv").write_text(csv_text(results), encoding="utf-8")
