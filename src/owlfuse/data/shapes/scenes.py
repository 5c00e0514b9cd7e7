"""What the pictures of *shapes* show and what is asked about them: a pure function of seed, split
and index, so that any picture can be drawn again on its own. `make_scene` says what is there,
`draw_scene` draws it, `ask` and `ask_held_out` question it.
"""

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
_STAR = [
    (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
    for k in range(10)
    for r in [(1, 0.42)[k % 2]]
]
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
GRID = 2  # cells a side, with one thing at most in each
TURNS = 6  # question-answer turns of a train or val picture
CLEARLY_APART = 24  # pixels between two centers before a question says left, right, above or below
_PAIRS = [
    (color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT_PAIRS
]


@dataclass(frozen=True)
class Thing:
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
    """What a picture shows."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """One turn. Two questions with one `subject` ask the same, however they are worded."""

    kind: str
    subject: tuple
    text: str
    answer: str


def _place(pairs: list[tuple[str, str]], rng: Random) -> tuple[Thing, ...]:
    """Put each (color, shape) into its own cell, moved at random as far as the cell has room."""
    things = []
    for (color, shape), cell in zip(pairs, rng.sample(range(GRID**2), len(pairs)), strict=True):
        size = rng.randint(40, 54)
        room = (PICTURE_SIZE // GRID - 2 - size) // 2  # at least two pixels stay between neighbours
        column, row = cell % GRID, cell // GRID
        x, y = (
            PICTURE_SIZE * (2 * k + 1) // (2 * GRID) + rng.randint(-room, room)
            for k in (column, row)
        )
        red, green, blue = (
            min(255, max(0, value + rng.randint(-12, 12))) for value in COLORS[color]
        )
        things.append(Thing(color, shape, cell, x, y, size, (red, green, blue)))
    return tuple(things)


def _draw_pairs(count: int, rng: Random) -> list[tuple[str, str]]:
    """Pairs for `count` things; a later one often shares its color or shape with an earlier one,
    so that counts pass 1."""
    pairs = [rng.choice(_PAIRS)]
    for _ in range(count - 1):
        color, shape = rng.choice(pairs)
        like = rng.random()
        same = [
            p
            for p in _PAIRS
            if (like < 0.3 and p[0] == color) or (0.3 <= like < 0.6 and p[1] == shape)
        ]
        pairs.append(rng.choice(same or _PAIRS))
    return pairs


def _belongs(things: tuple[Thing, ...], split: str) -> bool:
    """Val alone has an eighth of all contents (which things in which cells), whatever the seed and
    the sizes. A single thing may be in train and in val: of those there are so few that a model
    would learn by heart which never come."""
    kept_for_val = (
        zlib.crc32(repr(sorted((t.cell, t.color, t.shape) for t in things)).encode()) % 8 == 0
    )
    return len(things) == 1 or kept_for_val == (split == "val")


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of picture `index` of "train", "val" or "held_out".

    A held_out scene starts with its thing of a held-out pair, the only one of its color and of its
    shape. A train or val scene has no such pair, and allows a question of the kind that comes first
    in its chat.
    """
    rng = Random(f"scene {seed} {split} {index}")
    background = rng.randint(226, 255), rng.randint(226, 255), rng.randint(226, 255)
    count = rng.choices((1, 2, 3), weights=(30, 40, 30))[0]
    while True:
        pairs = _draw_pairs(count, rng)
        if split == "held_out":
            color, shape = HELD_OUT_PAIRS[index % len(HELD_OUT_PAIRS)]
            pairs = [(color, shape)] + [p for p in pairs[1:] if p[0] != color and p[1] != shape]
            return Scene(background, _place(pairs, rng))
        things = _place(pairs, rng)
        if _belongs(things, split) and _ASK[KINDS[index % len(KINDS)]](things, rng) is not None:
            return Scene(background, things)


@cache
def _mask(shape: str, size: int) -> Image.Image:
    """The antialiased (size, size) mask of a shape: drawn at four times the size, then reduced."""
    mask = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, 4 * size - 1, 4 * size - 1), fill=255)
    else:
        draw.polygon(
            [((x + 1) * 2 * size, (y + 1) * 2 * size) for x, y in _CORNERS[shape]], fill=255
        )
    return mask.reduce(4)


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 128x128."""
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), scene.background)
    for t in scene.things:
        picture.paste(t.rgb, (t.x - t.size // 2, t.y - t.size // 2), _mask(t.shape, t.size))
    return picture


def _singles(things: tuple[Thing, ...], attribute: str) -> list[Thing]:
    """The things that are the only ones of their color (or shape), so that a question can name
    them by it."""
    counts = Counter(getattr(t, attribute) for t in things)
    return [t for t in things if counts[getattr(t, attribute)] == 1]


def _ask_color(things: tuple[Thing, ...], rng: Random) -> Question | None:
    if not (singles := _singles(things, "shape")):
        return None
    t = rng.choice(singles)
    return Question(
        "color", (t.shape,), f"{rng.choice(('What', 'Which'))} color is the {t.shape}?", t.color
    )


def _ask_shape(things: tuple[Thing, ...], rng: Random) -> Question | None:
    if not (singles := _singles(things, "color")):
        return None
    t = rng.choice(singles)
    return Question(
        "shape",
        (t.color,),
        f"{rng.choice(('What', 'Which'))} shape is the {t.color} thing?",
        t.shape,
    )


def _ask_count(things: tuple[Thing, ...], rng: Random) -> Question:
    by = rng.choices(("all", "shape", "color"), weights=(1, 2, 2))[0]
    if by == "all":
        name, count = "things", len(things)
    else:
        counts = Counter(getattr(t, by) for t in things)
        # The count is drawn before what is counted: else nearly all answers would be 0 or 1.
        count = 0 if rng.random() < 0.25 else rng.choice(sorted(set(counts.values())))
        named = rng.choice([n for n in (SHAPES if by == "shape" else COLORS) if counts[n] == count])
        name = f"{named} things" if by == "color" else named + ("es" if named == "cross" else "s")
    return Question(
        "count", (name,), f"How many {name} {rng.choice(('are there', 'do you see'))}?", str(count)
    )


def _presence(color: str, shape: str, answer: str, rng: Random) -> Question:
    article = "an" if color == "orange" else "a"
    text = f"{rng.choice(('Is there', 'Do you see'))} {article} {color} {shape}?"
    return Question("presence", (color, shape), text, answer)


def _ask_presence(things: tuple[Thing, ...], rng: Random) -> Question:
    """Yes as often as no; most no's name a color and a shape that are both there, but not on one
    thing."""
    there = {(t.color, t.shape) for t in things}
    if rng.random() < 0.54:  # above a half, because a yes is more often a repeat, which `ask` drops
        return _presence(*rng.choice(sorted(there)), "yes", rng)
    absent = [p for p in _PAIRS if p not in there]
    colors, shapes = {c for c, _ in there}, {s for _, s in there}
    hard = [(c, s) for c, s in absent if c in colors and s in shapes]
    return _presence(*rng.choice(hard if hard and rng.random() < 0.7 else absent), "no", rng)


def _ask_position(things: tuple[Thing, ...], rng: Random) -> Question | None:
    """About two things, or one and the picture's middle: asked of two alone, a model learns to
    look at neither."""
    attribute = rng.choice([k for k in ("color", "shape") if _singles(things, k)] or [None])
    if attribute is None:
        return None
    named = {
        f"{t.color} thing" if attribute == "color" else t.shape: t
        for t in _singles(things, attribute)
    }
    name = rng.choice(list(named))
    thing, axis, other = named.pop(name), rng.choice("xy"), "middle"
    here, there = getattr(thing, axis), PICTURE_SIZE / 2
    apart = [n for n, t in named.items() if abs(getattr(t, axis) - here) >= CLEARLY_APART]
    if apart and rng.random() < 0.6:
        other = rng.choice(apart)
        there = getattr(named[other], axis)
    less, more, of = ("left", "right", " of") if axis == "x" else ("above", "below", "")
    text = f"Is the {name} {less} or {more}{of} the {other}?"
    return Question(
        "position", (axis, frozenset((name, other))), text, less if here < there else more
    )


# Each takes the things and a source of chance, and returns None where the things allow no such
# question.
_ASK = dict(
    zip(KINDS, (_ask_color, _ask_shape, _ask_count, _ask_presence, _ask_position), strict=True)
)


def ask(scene: Scene, first: str, rng: Random) -> list[Question]:
    """Six different questions: one of kind `first`, then the other kinds and one more in random
    order.

    A kind that the scene does not allow, or whose questions are used up, gives way to another.
    """
    rest = rng.sample([k for k in KINDS if k != first], len(KINDS) - 1)
    asked: dict[tuple, Question] = {}
    while len(asked) < TURNS:
        kind = rng.choice(KINDS) if len(asked) and not rest else (rest.pop() if asked else first)
        question = _ASK[kind](scene.things, rng)
        if question is not None:
            asked.setdefault((kind, question.subject), question)
    head, *tail = asked.values()
    return [head, *rng.sample(tail, len(tail))]


def ask_held_out(scene: Scene, rng: Random) -> list[Question]:
    """Two or three questions, all about the scene's first thing: its color, its shape, its
    presence."""
    thing = scene.things[0]
    questions = [
        _ask_color((thing,), rng),
        _ask_shape((thing,), rng),
        _presence(thing.color, thing.shape, "yes", rng),
    ]
    return rng.sample(
        [question for question in questions if question is not None], rng.choice((2, 3))
    )
