"""The embedded data set *shapes*: small pictures with questions, a few closed text tasks, and a tokenizer for both.

Everything is a pure function of the seed, the split and the index, so that any picture can be drawn again on its own:
`make_scene` says what is there, `draw_scene` draws it, `ask` and `ask_held_out` question it, `write_shapes` writes it.
"""

import itertools
import json
import math
import shutil
import uuid
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from owlfuse.data.shapes_text import TEXT_KINDS, make_texts, train_tokenizer

__all__ = ["COLORS", "HELD_OUT_PAIRS", "KINDS", "SHAPES", "TEXT_KINDS", "Question", "Scene", "Thing"]
__all__ += ["ask", "ask_held_out", "draw_scene", "make_scene", "write_shapes"]

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
_STAR = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k in range(10) for r in [(1, 0.42)[k % 2]]]
_ARM = 0.34
_CROSS = [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
# Corners in a box from -1 to 1, y downwards; the circle has none.
_CORNERS = {
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
TURNS = 6  # question-answer turns of a train or val picture
CLEARLY_APART = 24  # pixels between two centers before a question says left, right, above or below
_FORMAT_VERSION = 1
_PAIRS = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT_PAIRS]


@dataclass(frozen=True)
class Thing:
    """One object; x, y (its center) and size in pixels, cell 0..8 of the 3x3 grid, rgb its color after the jitter."""

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
    for (color, shape), cell in zip(pairs, rng.sample(range(9), len(pairs)), strict=True):
        size = rng.randint(28, 40)
        room = (PICTURE_SIZE // 3 - 2 - size) // 2  # at least two pixels stay between neighbours
        x, y = (PICTURE_SIZE * (2 * k + 1) // 6 + rng.randint(-room, room) for k in (cell % 3, cell // 3))
        rgb = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLORS[color])
        things.append(Thing(color, shape, cell, x, y, size, rgb))
    return tuple(things)


def _draw_pairs(rng: Random) -> list[tuple[str, str]]:
    """1 to 4 pairs; a later one often shares its color or shape with an earlier one, so that counts pass 1."""
    pairs = [rng.choice(_PAIRS)]
    for _ in range(rng.choices(range(4), weights=(15, 25, 30, 30))[0]):
        color, shape = rng.choice(pairs)
        like = rng.random()
        same = [p for p in _PAIRS if (like < 0.3 and p[0] == color) or (0.3 <= like < 0.6 and p[1] == shape)]
        pairs.append(rng.choice(same or _PAIRS))
    return pairs


def _is_val(things: tuple[Thing, ...]) -> bool:
    """An eighth of all contents (which objects in which cells) is kept for val, whatever the seed and the sizes."""
    return zlib.crc32(repr(sorted((t.cell, t.color, t.shape) for t in things)).encode()) % 8 == 0


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of picture `index` of "train", "val" or "held_out".

    A held_out scene starts with its thing of a held-out pair, the only one of its color and of its shape. A train or
    val scene has no such pair, and allows a question of the kind that comes first in its chat.
    """
    rng = Random(f"scene {seed} {split} {index}")
    background = tuple(rng.randint(226, 255) for _ in range(3))
    while True:
        pairs = _draw_pairs(rng)
        if split == "held_out":
            color, shape = HELD_OUT_PAIRS[index % len(HELD_OUT_PAIRS)]
            pairs = [(color, shape)] + [p for p in pairs[1:] if p[0] != color and p[1] != shape]
            return Scene(background, _place(pairs, rng))
        things = _place(pairs, rng)
        if _is_val(things) == (split == "val") and _ASK[KINDS[index % len(KINDS)]](things, rng) is not None:
            return Scene(background, things)


@cache
def _mask(shape: str, size: int) -> Image.Image:
    """The antialiased (size, size) mask of a shape: drawn at four times the size, then reduced."""
    mask = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, 4 * size - 1, 4 * size - 1), fill=255)
    else:
        draw.polygon([((x + 1) * 2 * size, (y + 1) * 2 * size) for x, y in _CORNERS[shape]], fill=255)
    return mask.reduce(4)


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 128x128."""
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), scene.background)
    for t in scene.things:
        picture.paste(t.rgb, (t.x - t.size // 2, t.y - t.size // 2), _mask(t.shape, t.size))
    return picture


def _singles(things: tuple[Thing, ...], attribute: str) -> list[Thing]:
    """The things that are the only ones of their color (or shape), so that a question can name them by it."""
    counts = Counter(getattr(t, attribute) for t in things)
    return [t for t in things if counts[getattr(t, attribute)] == 1]


def _ask_color(things: tuple[Thing, ...], rng: Random) -> Question | None:
    if not (singles := _singles(things, "shape")):
        return None
    t = rng.choice(singles)
    return Question("color", (t.shape,), f"{rng.choice(('What', 'Which'))} color is the {t.shape}?", t.color)


def _ask_shape(things: tuple[Thing, ...], rng: Random) -> Question | None:
    if not (singles := _singles(things, "color")):
        return None
    t = rng.choice(singles)
    return Question("shape", (t.color,), f"{rng.choice(('What', 'Which'))} shape is the {t.color} thing?", t.shape)


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
    return Question("count", (name,), f"How many {name} {rng.choice(('are there', 'do you see'))}?", str(count))


def _presence(color: str, shape: str, answer: str, rng: Random) -> Question:
    article = "an" if color == "orange" else "a"
    text = f"{rng.choice(('Is there', 'Do you see'))} {article} {color} {shape}?"
    return Question("presence", (color, shape), text, answer)


def _ask_presence(things: tuple[Thing, ...], rng: Random) -> Question:
    """Yes as often as no; most no's name a color and a shape that are both there, but not on one thing."""
    there = {(t.color, t.shape) for t in things}
    if rng.random() < 0.54:  # above a half, because a yes is more often a repeat, which `ask` drops
        return _presence(*rng.choice(sorted(there)), "yes", rng)
    absent = [p for p in _PAIRS if p not in there]
    colors, shapes = {c for c, _ in there}, {s for _, s in there}
    hard = [(c, s) for c, s in absent if c in colors and s in shapes]
    return _presence(*rng.choice(hard if hard and rng.random() < 0.7 else absent), "no", rng)


def _ask_position(things: tuple[Thing, ...], rng: Random) -> Question | None:
    choices = [
        (attribute, axis, a, b)
        for attribute in ("color", "shape")
        for a, b in itertools.permutations(_singles(things, attribute), 2)
        for axis in ("x", "y")
        if abs(getattr(a, axis) - getattr(b, axis)) >= CLEARLY_APART
    ]
    if not choices:
        return None
    attribute, axis, a, b = rng.choice(choices)
    name_a, name_b = (f"{t.color} thing" if attribute == "color" else t.shape for t in (a, b))
    less, more = ("left", "right") if axis == "x" else ("above", "below")
    of = " of" if axis == "x" else ""
    answer = less if getattr(a, axis) < getattr(b, axis) else more
    text = f"Is the {name_a} {less} or {more}{of} the {name_b}?"
    return Question("position", (axis, frozenset((name_a, name_b))), text, answer)


# Each takes the things and a source of chance, and returns None where the things allow no such question.
_ASK = dict(zip(KINDS, (_ask_color, _ask_shape, _ask_count, _ask_presence, _ask_position), strict=True))


def ask(scene: Scene, first: str, rng: Random) -> list[Question]:
    """Six different questions: one of kind `first`, then the other kinds and one more in random order.

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
    """Two or three questions, all about the scene's first thing: its color, its shape, its presence."""
    thing = scene.things[0]
    questions = [_ask_color((thing,), rng), _ask_shape((thing,), rng), _presence(thing.color, thing.shape, "yes", rng)]
    return rng.sample(questions, rng.choice((2, 3)))


def _write_picture(folder: Path, seed: int, place: tuple[str, int]) -> dict:
    """Write one PNG; return its record in LLaVA's format."""
    split, index = place
    scene, rng = make_scene(seed, split, index), Random(f"ask {seed} {split} {index}")
    file = f"images/{split}/{index:06d}.png"
    draw_scene(scene).save(folder / file)
    questions = ask_held_out(scene, rng) if split == "held_out" else ask(scene, KINDS[index % len(KINDS)], rng)
    turns = [{"from": who, "value": value} for q in questions for who, value in (("human", q.text), ("gpt", q.answer))]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    kinds = [q.kind for q in questions]
    return {"id": f"{split}-{index:06d}", "image": file, "conversations": turns, "kinds": kinds}


def _write_pictures(folder: Path, seed: int, sizes: dict[str, int], workers: int) -> dict[str, list[dict]]:
    from rich.console import Console
    from rich.progress import track

    for split in sizes:
        (folder / "images" / split).mkdir(parents=True)
    places = [(split, index) for split, size in sizes.items() for index in range(size)]
    records: dict[str, list[dict]] = {split: [] for split in sizes}
    console = Console(stderr=True)
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(partial(_write_picture, folder, seed), places)
        progress = track(done, "drawing shapes", len(places), console=console, disable=not console.is_terminal)
        for (split, _), record in zip(places, progress, strict=True):
            records[split].append(record)
    return records


def _is_written(folder: Path, arguments: dict) -> bool:
    """False where the folder is free, True where it holds this very set; anything else is a ValueError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    remedy = "choose another folder or delete it"
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds something else (it has no readable shapes.json): {remedy}") from None
    found = found if isinstance(found, dict) else {}
    differing = [f"{k} is {found.get(k)}, expected {v}" for k, v in arguments.items() if found.get(k) != v]
    if differing:
        raise ValueError(f"{folder} holds another set of shapes ({'; '.join(differing)}): {remedy}")
    wanted = {"shapes.json", "text_train.json", "text_val.json", "images", "tokenizer"}
    for split in ("train", "val", "held_out"):
        wanted.add(f"{split}.json")
        count, expected = len(list(folder.glob(f"images/{split}/*.png"))), arguments[f"{split}_pictures"]
        if count != expected:
            raise ValueError(f"{folder}/images/{split} has {count} pictures, expected {expected}: {remedy}")
    names = {p.name for p in folder.iterdir()}
    if names != wanted:
        raise ValueError(f"{folder} lacks {sorted(wanted - names)} and has foreign {sorted(names - wanted)}: {remedy}")
    return True


def write_shapes(
    folder: str,
    seed: int = 0,
    train_pictures: int = 12000,
    val_pictures: int = 400,
    held_out_pictures: int = 150,
    text_train: int = 6000,
    text_val: int = 400,
    workers: int = 2,
) -> None:
    """Write the data set into `folder`, byte for byte the same for the same arguments (`workers` threads or not).

    images/SPLIT/*.png and SPLIT.json (LLaVA's format) for train, val and held_out; text_train.json and text_val.json
    (Alpaca's format); tokenizer/ (a fast tokenizer with a ChatML template); shapes.json (these arguments).
    The folder appears whole or not at all. A folder that already holds this set is left as it is.

    Raises:
        ValueError: the folder holds another set or other files, or a size is too small.
    """
    sizes = {"train": train_pictures, "val": val_pictures, "held_out": held_out_pictures}
    arguments = {"format_version": _FORMAT_VERSION, "seed": seed, **{f"{k}_pictures": n for k, n in sizes.items()}}
    arguments |= {"text_train": text_train, "text_val": text_val}
    target = Path(folder).expanduser().resolve()
    if _is_written(target, arguments):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        texts = dict(zip(("text_train", "text_val"), make_texts(seed, text_train, text_val), strict=True))
        ours.mkdir()
        records = _write_pictures(ours, seed, sizes, workers) | texts
        for name, content in {**records, "shapes": arguments}.items():
            (ours / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        train_tokenizer(records["train"], records["text_train"]).save_pretrained(ours / "tokenizer")
        try:
            ours.rename(target)
        except OSError:
            if not _is_written(target, arguments):  # another process was first, and wrote the same
                raise
    finally:
        shutil.rmtree(ours, ignore_errors=True)
