"""Whether a trained model looks at what it is asked about.

`python tests/support/looks.py RUN ...` prints the figures of runs that are there, as a table.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from owlfuse.artifacts.load import load_with_processor
from owlfuse.data.shapes.scenes import PICTURE_SIZE, draw_scene, make_scene
from owlfuse.evaluation.explain.attention import attention_to_pictures

SIZE = (PICTURE_SIZE, PICTURE_SIZE)


@dataclass
class Looks:
    """Of color questions about pictures of several shapes, a number a picture: means over its
    questions, and over the shapes that are not asked about."""

    asked: np.ndarray
    """The share of the weight in the box of the shape that is asked about."""
    others: np.ndarray
    """In the box of another shape."""
    asked_area: np.ndarray
    """The boxes' shares of the picture: what an even spread has there."""
    others_area: np.ndarray
    right: np.ndarray
    """The share of right answers."""
    ahead: np.ndarray
    """How often the asked shape's box has more weight, by its area, than every other shape's."""

    def row(self, name):
        """A line of the table: means with 95% intervals over pictures."""
        cells = [
            f"{100 * x.mean():.1f} ± {100 * half(x):.1f}%"
            for x in (self.asked, self.others, self.asked - self.others)
        ]
        area = f"{100 * self.asked_area.mean():.1f}%"
        rest = f"{100 * self.ahead.mean():.0f}% | {100 * self.right.mean():.0f}%"
        return f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} | {area} | {rest} |"


HEADER = (
    "| run | asked shape's box | another shape's box | difference | even spread | asked ahead of "
    "all others | right answers |\n"
    "|---|---|---|---|---|---|---|"
)


def share_in(map, box, size):
    """The share of a map's weight that is inside a box, each patch's weight being spread evenly
    over the patch.

    Args:
        map: (h, w).
        box: left, top, right, bottom in pixels of a picture of `size` (width, height).
    """
    covered = []
    for patches, low, high, side in (
        (map.shape[0], box[1], box[3], size[1]),
        (map.shape[1], box[0], box[2], size[0]),
    ):
        edges = np.arange(patches + 1) * side / patches
        covered.append(
            np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)
            * patches
            / side
        )
    weights = map.double().cpu().numpy()
    return float(covered[0] @ weights @ covered[1] / weights.sum())


def box_of(thing):
    """(left, top, right, bottom) of the square of `thing.size` pixels that `draw_scene` draws the
    thing into, in pixels; it fills most of it. Right and bottom lie outside."""
    left, top = thing.x - thing.size // 2, thing.y - thing.size // 2
    return left, top, left + thing.size, top + thing.size


def half(x):
    """Half of the 95% interval of a mean."""
    return 1.96 * x.std(ddof=1) / len(x) ** 0.5


def asked_things(scene):
    """The things that a question can name by their shape."""
    shapes = [thing.shape for thing in scene.shapes]
    return [thing for thing in scene.shapes if shapes.count(thing.shape) == 1]


def looks_of(folder, pictures, layers=None):
    """What a run looks at in pictures of the validation split, which it has not seen, of those
    that show several shapes."""
    model, processor = load_with_processor(Path(folder))
    rows = []
    for index in range(pictures):
        scene = make_scene(0, "val", index)
        if len(scene.shapes) > 1 and asked_things(scene):
            rows.append(
                np.mean(
                    [look(model, processor, scene, thing, layers) for thing in asked_things(scene)],
                    axis=0,
                )
            )
    return Looks(*np.array(rows).T)


@torch.inference_mode()
def look(model, processor, scene, thing, layers=None):
    """One question."""
    content = [{"type": "image"}, {"type": "text", "text": f"What color is the {thing.shape}?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[draw_scene(scene)], text=prompt)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[
        0, inputs["input_ids"].shape[1] :
    ]
    (map,) = attention_to_pictures(model, inputs, ids, layers)
    shares = {other: share_in(map, box_of(other), SIZE) for other in scene.shapes}
    areas = {other: other.size**2 / PICTURE_SIZE**2 for other in scene.shapes}
    rest = [other for other in scene.shapes if other is not thing]
    ahead = all(shares[thing] / areas[thing] > shares[other] / areas[other] for other in rest)
    right = processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == thing.color
    others, others_area = (np.mean([values[other] for other in rest]) for values in (shares, areas))
    return shares[thing], others, areas[thing], others_area, right, ahead


if __name__ == "__main__":
    print(HEADER)
    for folder in sys.argv[1:]:
        print(looks_of(folder, 400).row(folder), flush=True)
