"""Attention maps drawn over the pictures."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

# readable with any kind of color vision, and lighter for more, so in print too
COLORS = "viridis"
MAX_PICTURES = 16
"""Pictures on one sheet."""
MAX_SIDE = 512
"""Pixels of a picture's longer side on a sheet."""


def overlay(picture: Image.Image, map: Tensor, peak: float | None = None) -> Image.Image:
    """Returns the picture in grey under the map in colors, an RGB picture of the same size. A patch
    is a block, as the backbone saw it.

    Args:
        map: (h, w), over the whole picture.
        peak: the density (see `density`) that is drawn lightest; by default the map's own highest.
    """
    # relative to the highest, so that small maps are visible too
    level = density(map) / (peak or float(density(map).max()) or 1.0)
    colors = (colormaps[COLORS](level.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)
    # NEAREST: a patch is one number, and smoothing would invent others
    blocks = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), blocks, 0.6)


def density(map: Tensor) -> np.ndarray:
    """Returns (h, w) relative to an even spread: 1 everywhere where the whole weight is on this
    picture and even."""
    return (map * map.numel()).double().cpu().numpy()


def side_by_side(
    pictures: list[Image.Image],
    maps: list[Tensor],
    question: str,
    answer: str,
) -> Image.Image:
    """Returns each picture beside its overlay, with its share of the weight where there are
    several; question, answer and a legend. Of more than 16 pictures those with most weight.

    Args:
        maps: one per picture, over all with sum 1.
    """
    by_weight = sorted(range(len(maps)), key=lambda i: -float(maps[i].sum()))
    order = sorted(by_weight[:MAX_PICTURES])
    # one scale for all pictures, so that they can be compared
    peak = max(float(density(maps[i]).max()) for i in order) or 1.0
    pairs = 4  # in a row
    if len(order) <= 4:
        pairs = min(len(order), 2)
    rows = math.ceil(len(order) / pairs)
    figure = Figure(figsize=(max(5.2, 4.4 * pairs), 2.3 * rows + 1.4), layout="constrained")
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for position, i in enumerate(order):
        row, column = divmod(position, pairs)
        picture_axis, overlay_axis = axes[row][2 * column :][:2]
        picture = pictures[i]
        scale = MAX_SIDE / max(picture.size)
        if scale < 1:
            # at least one pixel, also of the short side of a strip
            width, height = (max(1, round(scale * side)) for side in picture.size)
            picture = picture.resize((width, height))
        picture_axis.imshow(picture)
        overlay_axis.imshow(overlay(picture, maps[i], peak))
        if len(maps) > 1:
            picture_axis.set_title(f"picture {i + 1}", fontsize=8)
            overlay_axis.set_title(f"{float(maps[i].sum()):.0%} of the weight", fontsize=8)
    title = [
        wrap(f"Q: {question}", 46 * pairs, 6),
        wrap(f"A: {answer or '(nothing)'}", 46 * pairs, 6),
    ]
    if len(order) < len(maps):
        title.append(f"({len(order)} of {len(maps)} pictures, those with most of the weight)")
    figure.suptitle("\n".join(title), fontsize=10)
    legend(figure, axes, peak * len(maps))
    # no pyplot: the demo draws in several threads
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def wrap(text: str, width: int, lines: int) -> str:
    """Returns text broken into lines, at most so many, without signs that a plot would read as a
    formula or has no letter for."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    # Signs are escaped line by line, so that no line ends between one and its escape.
    return "\n".join(line.replace("$", r"\$") for line in textwrap.wrap(plain, width)[:lines])


def legend(figure: Any, axes: Any, peak: float) -> None:
    """Adds a bar of the colors to the figure, from 0 to `peak` times an even spread over all
    pictures."""
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, peak), COLORS),
        ax=axes,
        location="bottom",
        shrink=0.5,
        aspect=30,
        pad=0.03,
    )
    bar.set_label("attention of the answer, times an even spread", fontsize=8)
    bar.ax.tick_params(labelsize=7)
