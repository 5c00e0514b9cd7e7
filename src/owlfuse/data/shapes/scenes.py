"""The scenes of *shapes* and the questions about them: a pure function of seed, split and index, so
that any picture can be drawn again by itself. `make_scene` makes a scene, `draw_scene` draws it,
`ask` and `ask_held_out` ask questions about it.
"""

import itertools
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from random import Random

from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 30, 35),
    "green": (35, 150, 55),
    "blue": (35, 65, 215),
    "yellow": (240, 205, 15),
    "purple": (140, 40, 185),
    "orange": (250, 125, 15),
    "black": (25, 25, 28),
    "cyan": (20, 190, 205),
}
_STAR = []
for _k in range(10):
    _radius = 0.42 if _k % 2 else 1.0
    _STAR.append((_radius * math.sin(_k * math.pi / 5), -_radius * math.cos(_k * math.pi / 5)))
_ARM = 0.34
_CROSS = [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
# Corners in a box from -1 to 1, y downwards; the circle has none.
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "star": _STAR,
    "cross": _CROSS + [(-x, -y) for x, y in _CROSS],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
}
SHAPES = tuple(_CORNERS)
HELD_OUT_PAIRS = (
    ("red", "circle"),
    ("green", "star"),
    ("blue", "triangle"),
    ("yellow", "square"),
    ("purple", "cross"),
    ("orange", "diamond"),
)
KINDS = ("color", "shape", "count", "presence", "position")

PICTURE_SIZE = 128  # pixels
GRID = 2  # cells a side, with one shape at most in each
TURNS = 6  # question-answer turns of a train or val picture
CLEARLY_APART = 24  # pixels between two centers before a question says left, right, above or below
_PAIRS = [pair for pair in itertools.product(COLORS, SHAPES) if pair not in HELD_OUT_PAIRS]


@dataclass(frozen=True)
class Shape:
    """One object; x, y (its center) and size in pixels, cell 0..3 of the 2x2 grid, rgb its color
    after the jitter."""

    color: str
    shape: str
    cell: int
    x: int
    y: int
    size: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """The background and the shapes of a picture."""

    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Question:
    """One turn. Two questions with one `subject` ask the same, however they are worded."""

    kind: str
    subject: tuple
    text: str
    answer: str


def _place_pairs(pairs: list[tuple[str, str]], rng: Random) -> tuple[Shape, ...]:
    """Put each (color, shape) into a cell, moved at random as far as the cell has room."""
    shapes = []
    cells = rng.sample(range(GRID**2), len(pairs))
    for (color, shape), cell in zip(pairs, cells, strict=True):
        size = rng.randint(40, 54)
        # at least two pixels stay between neighbours
        margin = (PICTURE_SIZE // GRID - 2 - size) // 2
        row, column = divmod(cell, GRID)
        x = _cell_center(column) + rng.randint(-margin, margin)
        y = _cell_center(row) + rng.randint(-margin, margin)
        rgb = []
        for value in COLORS[color]:
            jittered = value + rng.randint(-12, 12)
            rgb.append(min(255, max(0, jittered)))
        red, green, blue = rgb
        shapes.append(Shape(color, shape, cell, x, y, size, (red, green, blue)))
    return tuple(shapes)


def _cell_center(index: int) -> int:
    """Return the pixel at the middle of a row or column of cells."""
    return PICTURE_SIZE * (2 * index + 1) // (2 * GRID)


def _draw_pairs(count: int, rng: Random) -> list[tuple[str, str]]:
    """Return pairs for `count` shapes; a later one often has the color or shape of an earlier one,
    so that counts pass 1."""
    pairs = [rng.choice(_PAIRS)]
    for _ in range(count - 1):
        color, shape = rng.choice(pairs)
        likeness = rng.random()
        similar = []
        if likeness < 0.3:
            similar = [pair for pair in _PAIRS if pair[0] == color]
        elif likeness < 0.6:
            similar = [pair for pair in _PAIRS if pair[1] == shape]
        pairs.append(rng.choice(similar or _PAIRS))
    return pairs


def _belongs(shapes: tuple[Shape, ...], split: str) -> bool:
    """Whether a scene may be in a split: an eighth of all contents (shapes in their cells) is in
    val alone, whatever the seed and the sizes.

    A single shape may be in train and in val: of those there are so few that a model would learn by
    heart which never come.
    """
    if len(shapes) == 1:
        return True
    content = sorted((shape.cell, shape.color, shape.shape) for shape in shapes)
    # not hash(), which differs between processes
    is_for_val = zlib.crc32(repr(content).encode()) % 8 == 0
    return is_for_val == (split == "val")


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Return the scene of picture `index` of "train", "val" or "held_out".

    A held_out scene starts with its shape of a held-out pair, the only one of its color and of its
    shape. A train or val scene has no such pair, and allows a question of the kind that comes first
    in its chat.
    """
    rng = Random(f"scene {seed} {split} {index}")
    red, green, blue = (rng.randint(226, 255) for _ in range(3))
    background = red, green, blue
    count = rng.choices((1, 2, 3), weights=(30, 40, 30))[0]
    first_question = _ASK[KINDS[index % len(KINDS)]]
    while True:
        pairs = _draw_pairs(count, rng)
        if split == "held_out":
            color, shape = HELD_OUT_PAIRS[index % len(HELD_OUT_PAIRS)]
            held_out_pairs = [(color, shape)]
            for other_color, other_shape in pairs[1:]:
                if other_color != color and other_shape != shape:
                    held_out_pairs.append((other_color, other_shape))
            return Scene(background, _place_pairs(held_out_pairs, rng))
        shapes = _place_pairs(pairs, rng)
        if _belongs(shapes, split) and first_question(shapes, rng) is not None:
            return Scene(background, shapes)


# 6 shapes in 15 sizes are 90 masks at most.
@cache
def _mask(shape: str, size: int) -> Image.Image:
    """Return the antialiased (size, size) mask of a shape: drawn at four times the size, then
    reduced."""
    width = 4 * size
    mask = Image.new("L", (width, width))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, width - 1, width - 1), fill=255)
    else:
        corners = []
        for x, y in _CORNERS[shape]:
            corners.append(((x + 1) * width / 2, (y + 1) * width / 2))
        draw.polygon(corners, fill=255)
    return mask.reduce(4)


def draw_scene(scene: Scene) -> Image.Image:
    """Return the picture of a scene: RGB, 128x128."""
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), scene.background)
    for shape in scene.shapes:
        corner = shape.x - shape.size // 2, shape.y - shape.size // 2
        picture.paste(shape.rgb, corner, _mask(shape.shape, shape.size))
    return picture


def _singles(shapes: tuple[Shape, ...], attribute: str) -> list[Shape]:
    """Return the shapes that are the only ones of their color (or shape), so that a question can
    name them by it."""
    counts = Counter(getattr(shape, attribute) for shape in shapes)
    return [shape for shape in shapes if counts[getattr(shape, attribute)] == 1]


def _ask_color(shapes: tuple[Shape, ...], rng: Random) -> Question | None:
    singles = _singles(shapes, "shape")
    if not singles:
        return None
    subject = rng.choice(singles)
    text = f"{rng.choice(('What', 'Which'))} color is the {subject.shape}?"
    return Question("color", (subject.shape,), text, subject.color)


def _ask_shape(shapes: tuple[Shape, ...], rng: Random) -> Question | None:
    singles = _singles(shapes, "color")
    if not singles:
        return None
    subject = rng.choice(singles)
    text = f"{rng.choice(('What', 'Which'))} shape is the {subject.color} thing?"
    return Question("shape", (subject.color,), text, subject.shape)


def _ask_count(shapes: tuple[Shape, ...], rng: Random) -> Question:
    attribute = rng.choices(("all", "shape", "color"), weights=(1, 2, 2))[0]
    if attribute == "all":
        name, count = "things", len(shapes)
    else:
        counts = Counter(getattr(shape, attribute) for shape in shapes)
        # The count is drawn before the counted name: else nearly all answers would be 0 or 1.
        count = 0
        if rng.random() >= 0.25:
            count = rng.choice(sorted(set(counts.values())))
        names = SHAPES if attribute == "shape" else COLORS
        name = rng.choice([name for name in names if counts[name] == count])
        if attribute == "color":
            name += " things"
        else:
            name += "es" if name == "cross" else "s"
    text = f"How many {name} {rng.choice(('are there', 'do you see'))}?"
    return Question("count", (name,), text, str(count))


def _presence(
    color: str,
    shape: str,
    answer: str,
    rng: Random,
) -> Question:
    article = "an" if color == "orange" else "a"
    text = f"{rng.choice(('Is there', 'Do you see'))} {article} {color} {shape}?"
    return Question("presence", (color, shape), text, answer)


def _ask_presence(shapes: tuple[Shape, ...], rng: Random) -> Question:
    """Ask for a pair: yes as often as no; most no's name a color and a shape that are both there,
    but not in one shape."""
    present = {(shape.color, shape.shape) for shape in shapes}
    # above a half, because a yes is more often a repeat, which `ask` drops
    if rng.random() < 0.54:
        # sorted, since the order of a set of texts differs between processes
        return _presence(*rng.choice(sorted(present)), "yes", rng)
    absent = [pair for pair in _PAIRS if pair not in present]
    colors = {color for color, _ in present}
    names = {name for _, name in present}
    hard = [(color, name) for color, name in absent if color in colors and name in names]
    pairs = hard if hard and rng.random() < 0.7 else absent
    return _presence(*rng.choice(pairs), "no", rng)


def _ask_position(shapes: tuple[Shape, ...], rng: Random) -> Question | None:
    """Ask about two shapes, or one and the picture's middle: asked of two alone, a model learns to
    look at neither."""
    attributes = [name for name in ("color", "shape") if _singles(shapes, name)]
    attribute = rng.choice(attributes or [None])
    if attribute is None:
        return None
    singles = {}
    for shape in _singles(shapes, attribute):
        singles[f"{shape.color} thing" if attribute == "color" else shape.shape] = shape
    name = rng.choice(list(singles))
    subject, axis, reference = singles.pop(name), rng.choice("xy"), "middle"
    position, reference_position = getattr(subject, axis), PICTURE_SIZE / 2
    apart = []
    for candidate, shape in singles.items():
        if abs(getattr(shape, axis) - position) >= CLEARLY_APART:
            apart.append(candidate)
    if apart and rng.random() < 0.6:
        reference = rng.choice(apart)
        reference_position = getattr(singles[reference], axis)
    less, more, relation = "above", "below", "above or below"
    if axis == "x":
        less, more, relation = "left", "right", "left or right of"
    text = f"Is the {name} {relation} the {reference}?"
    answer = less if position < reference_position else more
    return Question("position", (axis, frozenset((name, reference))), text, answer)


# Each takes the shapes and a random generator, and returns None where the shapes allow no such
# question.
_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "presence": _ask_presence,
    "position": _ask_position,
}


def ask(scene: Scene, first: str, rng: Random) -> list[Question]:
    """Return six different questions: one of kind `first`, then the other kinds and one more in
    random order.

    A kind that the scene does not allow, or whose questions are used up, gives way to another.
    """
    other_kinds = [kind for kind in KINDS if kind != first]
    kinds = rng.sample(other_kinds, len(other_kinds))
    questions: dict[tuple, Question] = {}
    while len(questions) < TURNS:
        if not questions:
            kind = first
        elif kinds:
            kind = kinds.pop()
        else:
            kind = rng.choice(KINDS)
        question = _ASK[kind](scene.shapes, rng)
        if question is not None:
            questions.setdefault((kind, question.subject), question)
    head, *tail = questions.values()
    return [head, *rng.sample(tail, len(tail))]


def ask_held_out(scene: Scene, rng: Random) -> list[Question]:
    """Return two or three questions, all about the scene's first shape: its color, its shape, its
    presence."""
    subject = scene.shapes[0]
    questions = [
        _ask_color((subject,), rng),
        _ask_shape((subject,), rng),
        _presence(subject.color, subject.shape, "yes", rng),
    ]
    possible = [question for question in questions if question is not None]
    return rng.sample(possible, rng.choice((2, 3)))
