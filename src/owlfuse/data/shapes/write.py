"""The embedded data set *shapes*: small pictures with questions, a few closed text tasks, and a
tokenizer for both."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_directory, read_json
from owlfuse.core.progress import track
from owlfuse.data.shapes.scenes import KINDS, ask, ask_held_out, draw_scene, make_scene
from owlfuse.data.shapes.text import make_texts, train_tokenizer

# Raised when the same arguments give other files than before.
_FORMAT_VERSION = 6


def _write_picture(folder: Path, seed: int, picture: tuple[str, int]) -> dict:
    """Write one PNG, a (split, index), and return its record in LLaVA's format."""
    split, index = picture
    # Generators of its own for each picture, so that threads may draw them in any order.
    scene, rng = make_scene(seed, split, index), Random(f"ask {seed} {split} {index}")
    file = f"images/{split}/{index:06d}.png"
    draw_scene(scene).save(folder / file)
    if split == "held_out":
        questions = ask_held_out(scene, rng)
    else:
        questions = ask(scene, KINDS[index % len(KINDS)], rng)
    turns = []
    for question in questions:
        turns.append({"from": "human", "value": question.text})
        turns.append({"from": "gpt", "value": question.answer})
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    kinds = [question.kind for question in questions]
    return {"id": f"{split}-{index:06d}", "image": file, "conversations": turns, "kinds": kinds}


def _write_pictures(
    folder: Path,
    seed: int,
    sizes: dict[str, int],
    workers: int,
) -> dict[str, list[dict]]:
    pictures = []
    records: dict[str, list[dict]] = {}
    for split, size in sizes.items():
        (folder / "images" / split).mkdir(parents=True)
        pictures += [(split, index) for index in range(size)]
        records[split] = []
    with ThreadPoolExecutor(workers) as pool:
        written = pool.map(partial(_write_picture, folder, seed), pictures)
        progress = track(written, "drawing shapes", len(pictures))
        for (split, _), record in zip(pictures, progress, strict=True):
            records[split].append(record)
    return records


def _is_written(folder: Path, arguments: dict) -> bool:
    """Whether the folder holds this very set; False where it is free.

    Raises ValueError for any other content.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    remedy = "choose another folder or delete it"
    try:
        written = read_json(folder / "shapes.json")
    except DataError:
        raise ValueError(
            f"{folder} holds something else (it has no readable shapes.json): {remedy}"
        ) from None
    differing = []
    for key, value in arguments.items():
        if written.get(key) != value:
            differing.append(f"{key} is {written.get(key)}, expected {value}")
    if differing:
        raise ValueError(f"{folder} holds another set of shapes ({'; '.join(differing)}): {remedy}")
    expected_names = {"shapes.json", "text_train.json", "text_val.json", "images", "tokenizer"}
    for split in ("train", "val", "held_out"):
        expected_names.add(f"{split}.json")
        count = len(list(folder.glob(f"images/{split}/*.png")))
        expected = arguments[f"{split}_pictures"]
        if count != expected:
            raise ValueError(
                f"{folder}/images/{split} has {count} pictures, expected {expected}: {remedy}"
            )
    # .owlfuse has the cached counts of tokens
    names = {path.name for path in folder.iterdir() if path.name != ".owlfuse"}
    if names != expected_names:
        raise ValueError(
            f"{folder} lacks {sorted(expected_names - names)} and has foreign "
            f"{sorted(names - expected_names)}: {remedy}"
        )
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
    """Write the data set into `folder`, byte for byte the same for the same arguments (`workers`
    threads or not).

    images/SPLIT/*.png and SPLIT.json (LLaVA's format) for train, val and held_out; text_train.json
    and text_val.json (Alpaca's format); tokenizer/ (a fast tokenizer with a ChatML template);
    shapes.json (these arguments). The folder is written atomically. A folder that already holds
    this set stays as it is.

    Args:
        folder: of the data set.
        seed: of pictures and questions.
        train_pictures, val_pictures, held_out_pictures: of each split.
        text_train, text_val: text tasks of each split.
        workers: threads that draw.

    Raises:
        ValueError: the folder holds another set or other files, or a size is too small.
    """
    sizes = {"train": train_pictures, "val": val_pictures, "held_out": held_out_pictures}
    arguments: dict[str, int] = {"format_version": _FORMAT_VERSION, "seed": seed}
    for split, size in sizes.items():
        arguments[f"{split}_pictures"] = size
    arguments |= {"text_train": text_train, "text_val": text_val}
    for key, value in arguments.items():
        if key != "seed" and value < 0:
            raise ValueError(f"{key} is {value}, expected 0 or more")
    target = Path(folder).expanduser().resolve()
    if _is_written(target, arguments):
        return
    train_texts, val_texts = make_texts(seed, text_train, text_val)
    texts = {"text_train": train_texts, "text_val": val_texts}
    try:
        with atomic_directory(target) as temporary:
            records = _write_pictures(temporary, seed, sizes, workers) | texts
            for name, content in {**records, "shapes": arguments}.items():
                (temporary / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
            tokenizer = train_tokenizer(records["train"], records["text_train"])
            tokenizer.save_pretrained(temporary / "tokenizer")
    except OSError:
        if not _is_written(target, arguments):  # another process was first, and wrote the same
            raise
