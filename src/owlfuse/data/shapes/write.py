"""The embedded data set *shapes*: small pictures with questions, a few closed text tasks, and a
tokenizer for both."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from owlfuse.core.files import atomic_directory
from owlfuse.core.progress import track
from owlfuse.data.shapes.scenes import KINDS, ask, ask_held_out, draw_scene, make_scene
from owlfuse.data.shapes.text import make_texts, train_tokenizer

_FORMAT_VERSION = 6


def _write_picture(folder: Path, seed: int, place: tuple[str, int]) -> dict:
    """Write one PNG; return its record in LLaVA's format."""
    split, index = place
    scene, rng = make_scene(seed, split, index), Random(f"ask {seed} {split} {index}")
    file = f"images/{split}/{index:06d}.png"
    draw_scene(scene).save(folder / file)
    questions = (
        ask_held_out(scene, rng)
        if split == "held_out"
        else ask(scene, KINDS[index % len(KINDS)], rng)
    )
    turns = [
        {"from": who, "value": value}
        for q in questions
        for who, value in (("human", q.text), ("gpt", q.answer))
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    kinds = [q.kind for q in questions]
    return {"id": f"{split}-{index:06d}", "image": file, "conversations": turns, "kinds": kinds}


def _write_pictures(
    folder: Path, seed: int, sizes: dict[str, int], workers: int
) -> dict[str, list[dict]]:
    for split in sizes:
        (folder / "images" / split).mkdir(parents=True)
    places = [(split, index) for split, size in sizes.items() for index in range(size)]
    records: dict[str, list[dict]] = {split: [] for split in sizes}
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(partial(_write_picture, folder, seed), places)
        for (split, _), record in zip(
            places, track(done, "drawing shapes", len(places)), strict=True
        ):
            records[split].append(record)
    return records


def _is_written(folder: Path, arguments: dict) -> bool:
    """False where the folder is free, True where it holds this very set; anything else is a
    ValueError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    remedy = "choose another folder or delete it"
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"{folder} holds something else (it has no readable shapes.json): {remedy}"
        ) from None
    found = found if isinstance(found, dict) else {}
    differing = [
        f"{k} is {found.get(k)}, expected {v}" for k, v in arguments.items() if found.get(k) != v
    ]
    if differing:
        raise ValueError(f"{folder} holds another set of shapes ({'; '.join(differing)}): {remedy}")
    wanted = {"shapes.json", "text_train.json", "text_val.json", "images", "tokenizer"}
    for split in ("train", "val", "held_out"):
        wanted.add(f"{split}.json")
        count, expected = (
            len(list(folder.glob(f"images/{split}/*.png"))),
            arguments[f"{split}_pictures"],
        )
        if count != expected:
            raise ValueError(
                f"{folder}/images/{split} has {count} pictures, expected {expected}: {remedy}"
            )
    # where counts of tokens are kept
    names = {p.name for p in folder.iterdir() if p.name != ".owlfuse"}
    if names != wanted:
        raise ValueError(
            f"{folder} lacks {sorted(wanted - names)} and has foreign {sorted(names - wanted)}: "
            f"{remedy}"
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
    shapes.json (these arguments). The folder appears whole or not at all. A folder that already
    holds this set is left as it is.

    Args:
        folder: where the data set lies.
        seed: of what is drawn and asked.
        train_pictures, val_pictures, held_out_pictures: of each split.
        text_train, text_val: text tasks of each split.
        workers: threads that draw.

    Raises:
        ValueError: the folder holds another set or other files, or a size is too small.
    """
    sizes = {"train": train_pictures, "val": val_pictures, "held_out": held_out_pictures}
    arguments = {
        "format_version": _FORMAT_VERSION,
        "seed": seed,
        **{f"{k}_pictures": n for k, n in sizes.items()},
    }
    arguments |= {"text_train": text_train, "text_val": text_val}
    target = Path(folder).expanduser().resolve()
    if _is_written(target, arguments):
        return
    texts = dict(
        zip(("text_train", "text_val"), make_texts(seed, text_train, text_val), strict=True)
    )
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
