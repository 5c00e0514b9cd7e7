"""The embedded data set: what it writes, that its answers are true, and that its splits keep
apart."""

import filecmp
import itertools
import json
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from owlfuse.data.shapes.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    SHAPES,
    Scene,
    Shape,
    draw_scene,
    make_scene,
)
from owlfuse.data.shapes.text import TEXT_KINDS
from owlfuse.data.shapes.write import write_shapes

SIZES = {
    "train_pictures": 600,
    "val_pictures": 100,
    "held_out_pictures": 36,
    "text_train": 3000,
    "text_val": 200,
}
TINY = {
    "train_pictures": 10,
    "val_pictures": 5,
    "held_out_pictures": 3,
    "text_train": 40,
    "text_val": 8,
}
SPLITS = ("train", "val", "held_out")
PLURALS = {"crosses" if shape == "cross" else f"{shape}s": shape for shape in SHAPES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(str(folder), seed=3, **SIZES)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def turns(record: dict) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of each turn."""
    values = [turn["value"] for turn in record["conversations"]]
    questions = [value.removeprefix("<image>\n") for value in values[::2]]
    return list(zip(record["kinds"], questions, values[1::2], strict=True))


def scene_of(record: dict) -> Scene:
    split, _, index = record["id"].rpartition("-")
    return make_scene(3, split, int(index))


def content(scene: Scene) -> frozenset:
    return frozenset((t.color, t.shape, t.cell) for t in scene.shapes)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def differing_files(one: Path, other: Path) -> list[str]:
    assert files(one) == files(other)
    _, differing, failed = filecmp.cmpfiles(one, other, files(one), shallow=False)
    return differing + failed


def only(things: list[Shape]) -> Shape:
    assert len(things) == 1, f"the question names one thing, the picture has {len(things)}"
    return things[0]


def named(scene: Scene, name: str) -> list[Shape]:
    """The things that "star", "red thing", "stars", "red things" or "things" names."""
    words = name.split()
    if words[-1] in ("thing", "things"):
        return [t for t in scene.shapes if words[:-1] in ([], [t.color])]
    shape = PLURALS.get(words[-1], words[-1])
    assert shape in SHAPES
    return [t for t in scene.shapes if t.shape == shape]


def answer_from_scene(scene: Scene, kind: str, question: str) -> str:
    """The answer worked out from the words of the question and the scene alone."""
    if kind == "color":
        return only(named(scene, re.fullmatch(r"\w+ color is the (\w+)\?", question)[1])).color
    if kind == "shape":
        return only(
            named(scene, re.fullmatch(r"\w+ shape is the (\w+ thing)\?", question)[1])
        ).shape
    if kind == "count":
        return str(
            len(
                named(scene, re.fullmatch(r"How many (.+) (?:are there|do you see)\?", question)[1])
            )
        )
    if kind == "presence":
        color, shape = re.fullmatch(r"(?:Is there|Do you see) an? (\w+) (\w+)\?", question).groups()
        return "yes" if any((t.color, t.shape) == (color, shape) for t in scene.shapes) else "no"
    pattern = r"Is the (.+) (left or right of|above or below) the (.+)\?"
    first, axis, second = re.fullmatch(pattern, question).groups()
    a = only(named(scene, first))
    b = SimpleNamespace(x=64, y=64) if second == "middle" else only(named(scene, second))
    if axis == "above or below":
        assert abs(a.y - b.y) >= 20
        return "above" if a.y < b.y else "below"
    assert abs(a.x - b.x) >= 20
    return "left" if a.x < b.x else "right"


def components(foreground: np.ndarray) -> int:
    """Connected regions (eight neighbours) of a (H, W) mask, by flooding one after another."""
    left = {tuple(p) for p in np.argwhere(foreground).tolist()}
    count = 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
    return count


def test_layout_is_the_documented_one(folder):
    assert {p.name for p in folder.iterdir()} == {
        *("images", "tokenizer", "shapes.json", "text_train.json", "text_val.json"),
        *(f"{split}.json" for split in SPLITS),
    }
    for split in SPLITS:
        records = read(folder, split)
        assert len(records) == SIZES[f"{split}_pictures"]
        assert sorted(r["image"] for r in records) == [
            f"images/{split}/{p.name}" for p in sorted((folder / "images" / split).iterdir())
        ]
        for i, record in enumerate(records):
            assert set(record) == {"id", "image", "conversations", "kinds"}
            assert record["id"] == f"{split}-{i:06d}"
            assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * len(
                record["kinds"]
            )
            assert [t["value"].count("<image>") for t in record["conversations"]] == [1] + [0] * (
                2 * len(record["kinds"]) - 1
            )
            questions = [q for _, q, _ in turns(record)]
            assert len(set(questions)) == len(questions)
            assert all(" " not in answer for _, _, answer in turns(record))


def test_pictures_are_rgb_128_and_equal_their_scene(folder):
    for split in SPLITS:
        for record in read(folder, split)[:20]:
            with Image.open(folder / record["image"]) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (128, 128))
                assert np.array_equal(np.asarray(picture), np.asarray(draw_scene(scene_of(record))))


def test_center_of_each_thing_has_its_color_and_things_do_not_touch(folder):
    names, palette = list(COLORS), np.array(list(COLORS.values()))
    for record in read(folder, "val")[:60]:
        scene = scene_of(record)
        with Image.open(folder / record["image"]) as picture:
            pixels = np.asarray(picture).astype(int)
        for t in scene.shapes:
            assert names[np.abs(palette - pixels[t.y, t.x]).sum(1).argmin()] == t.color
        count = components(np.abs(pixels - scene.background).sum(-1) > 20)
        assert count == len(scene.shapes), record["id"]


def test_shapes_differ_at_64_pixels_whatever_their_size():
    """At half the size no two shapes cover the same pixels: a circle and a square, the closest,
    share 81%."""

    def mask(shape: str, size: int) -> np.ndarray:
        scene = Scene((255, 255, 255), (Shape("black", shape, 0, 64, 64, size, (0, 0, 0)),))
        return (
            np.asarray(draw_scene(scene).convert("L").resize((64, 64), Image.Resampling.BILINEAR))
            < 128
        )

    for size in (40, 47, 54):
        masks = {shape: mask(shape, size) for shape in SHAPES}
        for a, b in itertools.combinations(SHAPES, 2):
            overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
            assert overlap < 0.85, (a, b, size, overlap)


@pytest.mark.parametrize("split", SPLITS)
def test_each_answer_follows_from_the_scene(folder, split):
    seen = Counter()
    for record in read(folder, split):
        for kind, question, answer in turns(record):
            assert answer == answer_from_scene(scene_of(record), kind, question), (
                record["id"],
                question,
            )
            seen[kind] += 1
    assert set(seen) == ({"color", "shape", "presence"} if split == "held_out" else set(KINDS))


def test_chats_have_six_turns_and_each_kind_comes_first_equally_often(folder):
    records = read(folder, "train")
    assert {len(r["kinds"]) for r in records} == {6}
    assert Counter(r["kinds"][0] for r in records) == {kind: len(records) // 5 for kind in KINDS}


def test_answers_are_balanced_and_a_guess_without_the_picture_scores_low(folder):
    train = [turn for record in read(folder, "train") for turn in turns(record)]
    presence = Counter(answer for kind, _, answer in train if kind == "presence")
    assert 0.45 < presence["yes"] / presence.total() < 0.55
    answers_to = {}
    for _, question, answer in train:
        answers_to.setdefault(question, Counter())[answer] += 1
    guess = {question: answers.most_common(1)[0][0] for question, answers in answers_to.items()}
    right = [guess.get(q) == a for record in read(folder, "val") for _, q, a in turns(record)]
    assert sum(right) / len(right) < 0.45


def test_many_of_the_noes_are_hard(folder):
    """Where a picture has such a pair, most no's ask for a color and a shape that are both
    there, but not together."""
    hard = []
    for record in read(folder, "train"):
        things = scene_of(record).shapes
        colors, shapes = {t.color for t in things}, {t.shape for t in things}
        for kind, question, answer in turns(record):
            if (kind, answer) == ("presence", "no") and len(colors) > 1 and len(shapes) > 1:
                color, shape = question.rstrip("?").split()[-2:]
                hard.append(color in colors and shape in shapes)
    assert len(hard) > 100
    assert sum(hard) / len(hard) > 0.5


def test_held_out_pairs_are_neither_shown_nor_asked_in_train_and_val(folder):
    for split in ("train", "val"):
        for record in read(folder, split):
            assert not {(t.color, t.shape) for t in scene_of(record).shapes} & set(HELD_OUT_PAIRS)
            text = json.dumps(record)
            assert not [pair for pair in HELD_OUT_PAIRS if " ".join(pair) in text]
    assert len(set(HELD_OUT_PAIRS)) == 6
    shown = [t for record in read(folder, "train") for t in scene_of(record).shapes]
    pairs = {(t.color, t.shape) for t in shown}
    assert pairs == {(c, s) for c in COLORS for s in SHAPES} - set(HELD_OUT_PAIRS)


def test_held_out_chats_are_about_a_thing_of_a_held_out_pair(folder):
    asked = set()
    for record in read(folder, "held_out"):
        (thing,) = [t for t in scene_of(record).shapes if (t.color, t.shape) in HELD_OUT_PAIRS]
        asked.add((thing.color, thing.shape))
        assert 2 <= len(turns(record)) <= 3
        for kind, question, answer in turns(record):
            about = {
                "color": thing.shape,
                "shape": f"{thing.color} thing",
                "presence": f"{thing.color} {thing.shape}",
            }
            assert question.endswith(f" {about[kind]}?")
            assert answer == {"color": thing.color, "shape": thing.shape, "presence": "yes"}[kind]
    assert asked == set(HELD_OUT_PAIRS)


def test_val_pictures_are_unseen(folder):
    """No picture is in both; and where several things are shown, no content (which things in
    which cells) is."""
    train, val = (
        [scene_of(record) for record in read(folder, split)] for split in ("train", "val")
    )
    assert len({content(scene) for scene in train}) > 200
    assert not set(train) & set(val)
    several = [
        {content(scene) for scene in scenes if len(scene.shapes) > 1} for scenes in (train, val)
    ]
    assert all(several)
    assert not several[0] & several[1]


def test_train_and_val_show_as_many_things():
    """The contents kept for val do not change how many things its pictures have."""
    shares = {}
    for split in ("train", "val"):
        counts = Counter(len(make_scene(0, split, index).shapes) for index in range(1500))
        shares[split] = [counts[n] / 1500 for n in (1, 2, 3)]
    assert shares["train"] == pytest.approx(shares["val"], abs=0.06)


def fact(sample: dict) -> tuple:
    """What is asked, without the wording: the task is told by its telling word, the thing by
    what is left."""
    text = f"{sample['instruction']} {sample['input']}".lower()
    signs = {"sum": "+", "add": "+", "difference": "-", "subtract": "-", "take": "-"}
    tasks = (
        "first",
        "last",
        "spell",
        "opposite",
        "plural",
        "after",
        "before",
        "twice",
        "hello",
        "larger",
        "smaller",
    )
    told = [task for task in tasks if task in text] + [
        signs[word] for word in signs if word in text
    ]
    task = (told + [sign for sign in "+-" if sign in text])[0]
    numbers = re.findall(r"\d+", text)
    if ("add" in text.split() and not sample["input"]) or "take" in text.split():
        numbers.reverse()  # "Add b to a", "Take b from a"
    if task in ("larger", "smaller"):
        return ("comparison", *sorted(map(int, numbers)))
    rest = sample["input"] or sample["instruction"].rstrip("?.").removesuffix(" twice").split()[-1]
    return (task, *numbers) if numbers else (task, rest)


def text_answer(sample: dict) -> str | None:
    """Arithmetic, comparison, spelling, hello and twice worked out again; None for what has no
    rule."""
    task, *given = fact(sample)
    if task == "comparison":
        return str(max(given) if "larger" in sample["instruction"] else min(given))
    rules = {
        "+": lambda a, b: str(int(a) + int(b)),
        "-": lambda a, b: str(int(a) - int(b)),
        "spell": " ".join,
        "first": lambda word: word[0],
        "last": lambda word: word[-1],
        "twice": lambda word: f"{word} {word}",
        "hello": lambda name: f"hello {name}",
    }
    return rules[task](*given) if task in rules else None


@pytest.mark.parametrize("name", ["text_train", "text_val"])
def test_text_answers_are_right(folder, name):
    samples = read(folder, name)
    assert len(samples) == SIZES[name]
    assert {s["kind"] for s in samples} == set(TEXT_KINDS)
    assert any(s["input"] for s in samples)
    assert all(set(s) == {"id", "instruction", "input", "output", "kind"} for s in samples)
    checked = [(s["output"], answer) for s in samples if (answer := text_answer(s)) is not None]
    assert len(checked) > 0.8 * len(samples)
    assert [pair for pair in checked if pair[0] != pair[1]] == []
    known = {
        ("opposite", "open"): "closed",
        ("after", "Sunday"): "Monday",
        ("before", "Sunday"): "Saturday",
        ("plural", "mouse"): "mice",
        ("plural", "box"): "boxes",
    }
    found = {fact(s): s["output"] for s in samples if fact(s) in known}
    assert found == {f: known[f] for f in found}
    assert name == "text_val" or found == known


def test_no_val_text_is_in_train_but_its_fact_is(folder):
    train, val = read(folder, "text_train"), read(folder, "text_val")
    assert not {(s["instruction"], s["input"]) for s in train} & {
        (s["instruction"], s["input"]) for s in val
    }
    answers = {fact(s): s["output"] for s in train}
    for sample in val:
        if sample["kind"] == "comparison":
            assert fact(sample) not in answers
        else:
            assert answers[fact(sample)] == sample["output"]


def test_few_train_texts_still_hold_each_val_fact(tmp_path):
    write_shapes(str(tmp_path / "set"), **TINY | {"text_val": 80})
    known = {fact(s) for s in read(tmp_path / "set", "text_train")}
    val = [s for s in read(tmp_path / "set", "text_val") if s["kind"] != "comparison"]
    assert len(val) == 60
    assert {fact(s) for s in val} <= known


def test_tokenizer_gives_back_every_text_and_splits_digits(folder, tokenizer):
    assert tokenizer.is_fast
    assert 500 <= len(tokenizer) <= 700
    texts = [
        value for record in read(folder, "val") for _, *pair in turns(record) for value in pair
    ]
    texts += [f"{s['instruction']}\n{s['input']}" for s in read(folder, "text_val")] + [
        "Ünseen 漢字  and\ttabs"
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    for number in map(str, range(10, 100)):
        assert tokenizer.tokenize(f"is {number}?")[-4:] == ["Ġ", *number, "?"]
    tokens = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.image_token}
    assert tokens == {"<|pad|>", "<|end|>", "<image>"}
    assert len(tokenizer("<|user|><image><|end|>").input_ids) == 3


def test_words_of_the_questions_are_one_token_each(folder, tokenizer):
    words = {
        f" {name}"
        for name in (*COLORS, *SHAPES, *PLURALS, "thing", "things", "many", "left", "above")
    }
    words |= {*COLORS, *SHAPES, "yes", "no", "left", "right", "above", "below", "How"}
    assert {
        word: tokenizer.tokenize(word) for word in words if len(tokenizer.tokenize(word)) != 1
    } == {}


def test_the_chat_template_takes_strings_and_parts(tokenizer):
    expected = "<|user|><image>\nHi<|assistant|>yes<|end|>"
    plain = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.apply_chat_template(plain, tokenize=False) == expected
    question = [{"type": "image"}, {"type": "text", "text": "\nHi"}]
    parts = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(parts[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == expected.removesuffix("yes<|end|>")
    with pytest.raises(Exception, match="type video, expected text or image"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}]}], tokenize=False
        )


def test_same_arguments_write_the_same_bytes_whatever_the_workers(tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 3), ("c", 1, 1)):
        write_shapes(str(tmp_path / name), seed=seed, workers=workers, **TINY)
    assert differing_files(tmp_path / "a", tmp_path / "b") == []
    assert {"train.json", "images/train/000000.png"} <= set(
        differing_files(tmp_path / "a", tmp_path / "c")
    )


def test_a_complete_set_is_left_alone(tmp_path):
    write_shapes(str(tmp_path / "set"), **TINY)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")}
    write_shapes(str(tmp_path / "set"), workers=1, **TINY)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_other_things_is_refused_and_untouched(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    write_shapes(str(target), **TINY)  # an empty folder is free
    with pytest.raises(
        ValueError, match=rf"{target}.*seed is 0, expected 1.*another folder or delete"
    ):
        write_shapes(str(target), **TINY, seed=1)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"foreign \['notes.txt'\].*another folder or delete"):
        write_shapes(str(target), **TINY)
    (target / "notes.txt").unlink()
    (target / "images/val/000002.png").unlink()
    with pytest.raises(ValueError, match="images/val has 4 pictures, expected 5"):
        write_shapes(str(target), **TINY)
    (target / "shapes.json").unlink()
    with pytest.raises(ValueError, match=r"no readable shapes\.json.*another folder or delete"):
        write_shapes(str(target), **TINY)
    assert (target / "train.json").exists()


@pytest.mark.parametrize("argument", ["train_pictures", "held_out_pictures", "text_val"])
def test_a_negative_size_is_refused_before_anything_is_written(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument} is -1, expected 0 or more"):
        write_shapes(str(tmp_path / "set"), **{**TINY, argument: -1})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr("owlfuse.data.shapes.write.draw_scene", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        write_shapes(str(tmp_path / "set"), **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_concurrent_writers_leave_one_whole_set(tmp_path):
    write_shapes(str(tmp_path / "alone"), **TINY)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        both = [pool.submit(partial(write_shapes, **TINY), str(tmp_path / "set")) for _ in range(2)]
        assert [future.result() for future in both] == [None, None]
    assert differing_files(tmp_path / "alone", tmp_path / "set") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "set"]


def test_the_slower_writer_keeps_the_set_of_the_faster(tmp_path, monkeypatch):
    """The other process finishes while ours is drawing: its files stay, and ours are discarded."""
    target, real = tmp_path / "set", draw_scene
    stamps = {}

    def overtaken(scene):
        if not stamps:
            stamps["started"] = 0
            write_shapes(str(target), **TINY)
            stamps["theirs"] = target.stat().st_ino
        return real(scene)

    monkeypatch.setattr("owlfuse.data.shapes.write.draw_scene", overtaken)
    write_shapes(str(target), workers=1, **TINY)
    assert target.stat().st_ino == stamps["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
