"""What a person looks at after a run: the table of metrics and the contact sheet."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image
from rich.table import Table
from torch import Tensor

from owlfuse.core.console import PlainConsole as Console
from owlfuse.data.media.images import to_rgb, turn_upright
from owlfuse.evaluation.explain.overlays import overlay
from owlfuse.evaluation.metrics import Answer


def print_metrics(metrics: dict[str, float], title: str) -> None:
    """One metric a line."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def write_answers(path: Path, answers: list[Answer]) -> None:
    """One JSON object a line for each answer; a picture without a file of its own is left out."""
    with path.open("w", encoding="utf-8") as file:
        for answer in answers:
            facts = {**vars(answer), "right": answer.right}
            facts["image"] = None if isinstance(answer.image, bytes) else answer.image
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def picked(answers: list[Answer], pictures: int) -> list[Answer]:
    """At most so many pictures, spread evenly over the answers, with a question each, taken in
    turn, so that wrong ones appear as often as they are."""
    by_picture = defaultdict(list)
    for answer in answers:
        by_picture[answer.image].append(answer)
    count = min(pictures, len(by_picture))
    groups = list(by_picture.values())
    chosen = [groups[i * len(groups) // count] for i in range(count)]
    return [group[i % len(group)] for i, group in enumerate(chosen)]


def write_contact_sheet(
    path: Path,
    answers: list[Answer],
    pictures: int,
    title: str,
    maps: dict[str, Tensor] | None = None,
) -> None:
    """A PNG of pictures with a question each, the answer, and right (green, tick) or wrong (red,
    cross, what was expected).

    Args:
        pictures: at most so many, see `picked`.
        maps: by the id of an answer, where it looked in its picture (see `evaluation.explain`),
            which is drawn beside it.
    """
    matplotlib.use("Agg")

    shown, maps = picked(answers, pictures), maps or {}
    if not shown:
        return
    columns = min(3 if maps else 6, len(shown))
    rows = -(-len(shown) // columns)
    width = 4.4 if maps else 2.2
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, 2.75 * rows + 0.5), squeeze=False
    )
    figure.suptitle(title, fontsize=12)
    for axis in axes.flat:
        axis.axis("off")
    for axis, answer in zip(axes.flat, shown, strict=False):
        picture = picture_of(answer)
        axis.imshow(with_overlay(picture, maps[answer.id]) if answer.id in maps else picture)
        text = (
            f"✓ {answer.answer}"
            if answer.right
            else f"✗ {answer.answer or '(nothing)'}  (is: {answer.expected})"
        )
        axis.set_title(wrap(answer.question), fontsize=8)
        axis.text(
            0.5,
            -0.04,
            wrap(text, 34),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color="#00693e" if answer.right else "#b3261e",
        )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def picture_of(answer: Answer) -> Image.Image:
    """The answer's picture, upright, as the model saw it."""
    shown: Any = BytesIO(answer.image) if isinstance(answer.image, bytes) else answer.image
    with Image.open(shown) as file:
        turn_upright(file)
        return to_rgb(file)


def with_overlay(picture: Image.Image, map: Tensor) -> Image.Image:
    """The picture, and beside it the overlay of where the answer looked."""
    both = Image.new("RGB", (2 * picture.width, picture.height))
    both.paste(picture)
    both.paste(overlay(picture, map), (picture.width, 0))
    return both


def wrap(text: str, width: int = 30) -> str:
    """Text broken into lines, at most four, without what a plot would take as a formula or has
    no letter for."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return "\n".join(line.replace("$", r"\$") for line in textwrap.wrap(plain, width)[:4])
