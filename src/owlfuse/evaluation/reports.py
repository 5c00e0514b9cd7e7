"""Reports for people: the table of metrics and the contact sheet."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch import Tensor

from owlfuse.core.console import PlainConsole
from owlfuse.core.files import atomic_write
from owlfuse.data.media.images import to_rgb, turn_upright
from owlfuse.evaluation.explain.overlays import overlay, wrap
from owlfuse.evaluation.metrics import Answer


def print_metrics(metrics: dict[str, float], title: str) -> None:
    """Prints one metric a line."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    PlainConsole().print(table)


ANSWERS = "answers.jsonl"


def write_answers(path: Path, answers: list[Answer]) -> None:
    """Writes one JSON object a line for each answer; of a picture or video without a file the hash
    of its bytes, as `image_hash` or `video_hash`, by which answers to one picture are known."""
    # Ids and paths may hold lone surrogates, which UTF-8 lacks; \udcff is an escape of JSON too.
    with atomic_write(path, "wb") as file:
        for answer in answers:
            record = {**vars(answer), "right": answer.right}
            for key in ("image", "video"):
                # JSON has no bytes
                if isinstance(record[key], bytes):
                    record[f"{key}_hash"] = hashlib.sha256(record[key]).hexdigest()
                    record[key] = None
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))


def sample_for_sheet(answers: list[Answer], pictures: int) -> list[Answer]:
    """Returns an answer each for at most so many pictures, spread evenly over all; of the answers
    to a picture the first, second, ... in turn, so that wrong ones are as frequent as among all."""
    by_picture = defaultdict(list)
    for answer in answers:
        by_picture[answer.image].append(answer)
    groups = list(by_picture.values())
    count = min(pictures, len(groups))
    sampled = []
    for index in range(count):
        group = groups[index * len(groups) // count]
        sampled.append(group[index % len(group)])
    return sampled


def write_contact_sheet(
    path: Path,
    answers: list[Answer],
    pictures: int,
    title: str,
    maps: dict[int, Tensor] | None = None,
) -> None:
    """Writes a PNG of pictures with a question each, the answer, and right (green, tick) or wrong
    (red, cross, what was expected).

    Args:
        answers: one at least.
        pictures: at most so many, one at least, see `sample_for_sheet`.
        maps: by the place on the sheet, the answer's attention map over the picture (see
            `evaluation.explain`), which is drawn beside it.
    """
    answers, maps = sample_for_sheet(answers, pictures), maps or {}
    # a picture with its overlay is twice as wide
    columns = min(3 if maps else 6, len(answers))
    rows = -(-len(answers) // columns)
    width = 4.4 if maps else 2.2
    # no pyplot: most machines that train have no screen, and it keeps every figure
    figure = Figure(figsize=(width * columns, 2.75 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=12)
    for axis in axes.flat:
        axis.axis("off")
    # the last row may have more axes than answers
    for place, (axis, answer) in enumerate(zip(axes.flat, answers, strict=False)):
        picture = picture_of(answer)
        if place in maps:
            picture = with_overlay(picture, maps[place])
        axis.imshow(picture)
        if answer.right:
            text = f"✓ {answer.answer}"
        else:
            text = f"✗ {answer.answer or '(nothing)'}  (is: {answer.expected})"
        axis.set_title(wrap(answer.question, 30, 4), fontsize=8)
        axis.text(
            0.5,
            -0.04,
            wrap(text, 34, 4),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color="#00693e" if answer.right else "#b3261e",
        )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)


def picture_of(answer: Answer) -> Image.Image:
    """Returns the answer's picture, upright, as the model saw it."""
    source: Any = BytesIO(answer.image) if isinstance(answer.image, bytes) else answer.image
    with Image.open(source) as file:
        turn_upright(file)
        return to_rgb(file)


def with_overlay(picture: Image.Image, map: Tensor) -> Image.Image:
    """Returns the picture, and beside it the overlay of the answer's attention."""
    both = Image.new("RGB", (2 * picture.width, picture.height))
    both.paste(picture)
    both.paste(overlay(picture, map), (picture.width, 0))
    return both
