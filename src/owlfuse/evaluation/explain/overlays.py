"""Maps of where an answer looked, drawn over the pictures."""

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

# told apart with any kind of color vision, and lighter for more, so in print too
COLORS = "viridis"
SHOWN = 16  # pictures on one sheet
SIDE = 512  # pixels that a picture has on a sheet at most


def overlay(picture: Image.Image, map: Tensor, peak: float | None = None) -> Image.Image:
    """The picture in grey under the map in colors, an RGB picture of the same size. A patch is a
    block, as the backbone saw it.

    Args:
        map: (h, w), over the whole picture.
        peak: the density (see `density`) that is drawn lightest; by default the map's own highest.
    """
    level = density(map) / (peak or float(density(map).max()) or 1.0)
    colors = (colormaps[COLORS](level.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)
    blocks = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), blocks, 0.6)


def density(map: Tensor) -> np.ndarray:
    """(h, w) where 1 is what each place has when all the weight is on this picture, and spread
    evenly."""
    return (map * map.numel()).double().cpu().numpy()


def side_by_side(
    pictures: list[Image.Image], maps: list[Tensor], question: str, answer: str
) -> Image.Image:
    """Each picture beside its overlay, with the share of the weight that it has where there are
    several; question, answer and a legend. Of more than 16 pictures those with most weight.

    Args:
        maps: one per picture, over all with sum 1.
    """
    order = sorted(sorted(range(len(maps)), key=lambda i: -float(maps[i].sum()))[:SHOWN])
    peak = max(float(density(maps[i]).max()) for i in order) or 1.0
    pairs = min(len(order), 1 if len(order) == 1 else 2 if len(order) <= 4 else 4)
    rows = math.ceil(len(order) / pairs)
    figure = Figure(figsize=(max(5.2, 4.4 * pairs), 2.3 * rows + 1.4), layout="constrained")
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, i in enumerate(order):
        left, right = axes[place // pairs][2 * (place % pairs) :][:2]
        shown = (
            ImageOps.contain(pictures[i], (SIDE, SIDE))
            if max(pictures[i].size) > SIDE
            else pictures[i]
        )
        left.imshow(shown)
        right.imshow(overlay(shown, maps[i], peak))
        if len(maps) > 1:
            left.set_title(f"picture {i + 1}", fontsize=8)
            right.set_title(f"{float(maps[i].sum()):.0%} of the weight", fontsize=8)
    figure.suptitle(title_of(question, answer, len(order), len(maps), 46 * pairs), fontsize=10)
    legend(figure, axes, peak * len(maps))
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def title_of(question: str, answer: str, shown: int, pictures: int, width: int) -> str:
    """Question and answer, broken into lines, long ones cut."""
    lines = []
    for mark, text in (("Q: ", question), ("A: ", answer or "(nothing)")):
        plain = "".join(letter if letter.isprintable() else " " for letter in text)
        lines += textwrap.wrap(f"{mark}{plain}".replace("$", r"\$"), width)[:6]
    if shown < pictures:
        lines.append(f"({shown} of {pictures} pictures, those with most of the weight)")
    return "\n".join(lines)


def legend(figure: Any, axes: Any, peak: float) -> None:
    """A bar of the colors, in the figure, to `peak` times what each place has when the weight is
    even over all pictures."""
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
