"""One HTML page of an ablation that needs nothing else: no network, no script, pictures inside.

What models, data and users say is text: jinja2 escapes all of it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from owlfuse.config.identity import flat
from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_write
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.studies.ablation.results import Question, Results, RunAnswers
from owlfuse.studies.ablation.tables import notes, paper_frame, text_frame

QUESTION_COUNT = 8
"""Questions whose answers stand side by side."""
THUMBNAIL_SIDE = 128
"""Pixels of the longer side."""
ALT = {
    "scores": "Scores of the cells with intervals; the numbers are those of the table",
    "learning_curves": "Loss over optimizer steps",
    "score_against_cost": "Score against throughput, memory and time per generated token",
}


def write_page(results: Results, plots: dict[str, Path], path: Path) -> None:
    """Writes the page atomically.

    Args:
        plots: SVG files by name.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # answers, questions and errors may hold tags
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    columns, rows = number_table(results)
    command = ["owlfuse", "ablate", results.record["name"], *results.record.get("words", [])]
    images = []
    for name, plot in plots.items():
        images.append({"alt": ALT[name], "uri": data_uri(plot.read_bytes(), "image/svg+xml")})
    page = environment.get_template("page.html.jinja").render(
        results=results,
        record=results.record,
        number_columns=columns,
        number_rows=rows,
        paper=paper_frame(results) if results.record.get("paper") else None,
        notes=notes(results),
        plots=images,
        differences=config_differences(results),
        command=" ".join(command),
        origin=origin(results),
        **side_by_side(results),
    )
    # A reader may have the page of before open.
    with atomic_write(path) as file:
        file.write(page)


def breakable(name: str) -> Markup:
    """Return a metric's or cell's name that may go on in a new line after its signs."""
    # str: Markup would escape the tag that joins its parts.
    return Markup(re.sub(r"([/_-])", r"\1<wbr>", str(escape(name))))


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def number_table(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the numbers; a metric is a pair of its mean and difference,
    which stand below each other."""
    frame = text_frame(results)
    rows = []
    for texts in frame.to_numpy():
        row: list[Any] = []
        # By position: every metric has a column that is called `difference`.
        for column, text in zip(frame.columns, texts):
            if column == "difference":
                row[-1] = (row[-1], text)
            else:
                row.append(text)
        rows.append(row)
    return [column for column in frame.columns if column != "difference"], rows


def side_by_side(results: Results) -> dict[str, Any]:
    """Return the same questions for all cells, those first whose answers differ in being right; of
    one finished seed of each cell."""
    source = results.record["metrics"][results.metrics[0]][0]
    seed = most_finished_seed(results)
    runs = [run for run in results.finished if run.seed == seed]
    answers = [run.answers(source) for run in runs]
    # The question is the same for all cells: its picture and text are the first one's.
    questions = []
    for key in pick_questions(answers) if answers else ():
        first = answers[0][key]
        questions.append(
            {
                **first,
                "picture": thumbnail(first["image"]),
                "answers": [run_answers[key] for run_answers in answers],
            }
        )
    cells = [run.cell for run in runs]
    return {"source": source, "seed": seed, "finished_cells": cells, "questions": questions}


def most_finished_seed(results: Results) -> int | None:
    """Return the first seed under which most cells are finished; None where none is."""
    seeds = [run.seed for run in results.finished]
    if not seeds:
        return None
    return max(results.record["seeds"], key=seeds.count)


def pick_questions(answers: list[RunAnswers]) -> list[Question]:
    """Return at most QUESTION_COUNT questions that all runs answered, three quarters of them such
    that not all runs are right or all wrong."""
    disputed: list[Question] = []
    agreed: list[Question] = []
    for question in answers[0]:
        if not all(question in run_answers for run_answers in answers):
            continue
        verdicts = {run_answers[question]["right"] for run_answers in answers}
        (disputed if len(verdicts) > 1 else agreed).append(question)
    # Evenly over the file: its first questions may be of one kind.
    picked = spread(disputed, QUESTION_COUNT * 3 // 4)
    return picked + spread(agreed, QUESTION_COUNT - len(picked))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def thumbnail(path: str | None) -> str | None:
    """Return a small picture as an address that holds it, and None where there is none."""
    if path is None:
        return None
    file = Path(path).absolute()
    try:
        # The answers of a run from elsewhere name any file.
        small = open_image(Path(file.anchor), str(file), "of the answers", MAX_PIXELS)
    except DataError:
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    encoded = BytesIO()
    kind = "png" if max(small.size) <= 64 else "jpeg"  # PNG: every pixel of a tiny one is seen
    small.save(encoded, kind, quality=85)
    return data_uri(encoded.getvalue(), f"image/{kind}")


def config_differences(results: Results) -> pd.DataFrame:
    """Return the configuration keys that are not the same in all cells, a column for each cell."""
    # The name is the cell's and seed's, and differs always.
    columns = {}
    for row in results.rows:
        texts = {key: str(value) for key, value in flat(row.config).items() if key != "name"}
        columns[row.name] = pd.Series(texts, dtype=object)
    # A key that a cell does not have becomes a dash.
    frame = pd.DataFrame(columns).fillna("-").sort_index()
    return frame[frame.nunique(axis=1) > 1]


def origin(results: Results) -> list[tuple[str, str]]:
    """Return versions, commits, hashes, the machine and the date."""
    finished = results.finished
    commits = sorted({str(run.results["git"]) for run in finished})
    code_hashes = sorted({run.results["hash"]["code"] for run in finished})
    seconds = sum(run.results["wall_s"] for run in finished)
    facts = [
        ("experiment", results.record["base"]),
        ("written", f"{datetime.now():%Y-%m-%d %H:%M}"),
        ("machine", "; ".join(sorted({run.machine for run in finished})) or "-"),
        ("commit", ", ".join(commits) or "-"),
        ("code", ", ".join(code_hashes) or "-"),
    ]
    if finished:
        facts += finished[0].results["versions"].items()
    facts.append(("training", f"{seconds / 60:.1f} min in all"))
    for run in finished:
        facts.append((f"configuration of {run.key}", run.results["hash"]["config"]))
    return facts
