"""Questions about one of many pictures of *shapes*, the others being distractors (arXiv
2408.04840, section 4.3)."""

import json
from pathlib import Path
from random import Random
from typing import Any

from owlfuse.core.files import atomic_write
from owlfuse.data.shapes.write import write_shapes

COUNTS = (1, 2, 4, 8, 16, 32)
"""Pictures of a validation chat, a file for each."""


def write_many(
    folder: str,
    shapes_folder: str,
    seed: int = 0,
    chats: int = 6000,
    most: int = 8,
    questions: int = 100,
    shapes: dict[str, Any] | None = None,
) -> None:
    """Writes train.json and val_<n>.json for n of `COUNTS` into `folder`, in LLaVA's format; the
    pictures stay in `shapes_folder`, which is written first where it is not there. The same files
    for the same arguments.

    Args:
        folder: where the chats lie.
        shapes_folder: where the pictures lie.
        seed: of the choice of pictures and questions.
        most: pictures of a chat in train.json.
        chats: of train.json, each with 1, 2, 4, ... or `most` pictures and a question about up to
            three of them.
        questions: of each validation file, one a chat; a picture is asked about in the same words
            whatever stands beside it.
        shapes: arguments of `write_shapes`.

    Raises:
        ValueError: the folder of shapes holds something else.
    """
    write_shapes(shapes_folder, **{"seed": seed, **(shapes or {})})
    read = {
        split: json.loads((Path(shapes_folder) / f"{split}.json").read_text())
        for split in ("train", "val")
    }
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    counts = [count for count in COUNTS if count <= most]
    rng = Random(f"many {seed}")
    train = [
        chat(f"train-{i:05d}", read["train"], rng.choice(counts), 3, rng) for i in range(chats)
    ]
    write(target / "train.json", train)
    for count in COUNTS:
        # the same pictures are asked about for every count
        asked = [Random(f"many {seed} {i}") for i in range(questions)]
        write(
            target / f"val_{count}.json",
            [chat(f"val-{i:05d}", read["val"], count, 1, r) for i, r in enumerate(asked)],
        )


def chat(
    name: str, records: list[dict[str, Any]], count: int, turns: int, rng: Random
) -> dict[str, Any]:
    """A chat about `count` pictures, with a question about each of at most `turns` of them."""
    targets = [
        (record, rng.randrange(len(record["kinds"])))
        for record in rng.sample(records, min(turns, count))
    ]
    chosen = {record["id"] for record, _ in targets}
    others = [
        record
        for record in rng.sample(records, min(count + turns, len(records)))
        if record["id"] not in chosen
    ]
    if len(others) < count - len(targets):
        raise ValueError(
            f"a chat about {count} pictures needs as many, and shapes has {len(records)}"
        )
    pictures = [record for record, _ in targets] + others[: count - len(targets)]
    rng.shuffle(pictures)
    place = {record["id"]: number for number, record in enumerate(pictures, 1)}
    conversations, kinds = [], []
    for record, turn in targets:
        question, answer = (
            part["value"].removeprefix("<image>\n")
            for part in record["conversations"][2 * turn :][:2]
        )
        conversations += [
            {"from": "human", "value": f"Picture {place[record['id']]}: {question}"},
            {"from": "gpt", "value": answer},
        ]
        kinds.append(record["kinds"][turn])
    conversations[0]["value"] = "<image>\n" * count + conversations[0]["value"]
    return {
        "id": name,
        "image": [record["image"] for record in pictures],
        "conversations": conversations,
        "kinds": kinds,
    }


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a file atomically; one that says the same is left alone, so that counts of its
    tokens stay good."""
    text = json.dumps(records, indent=1) + "\n"
    if path.exists() and path.read_text() == text:
        return
    with atomic_write(path) as file:
        file.write(text)
