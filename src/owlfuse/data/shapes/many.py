"""Questions about one of many pictures of *shapes*, the others being distractors (arXiv
2408.04840, section 4.3)."""

import json
from pathlib import Path
from random import Random

from owlfuse.core.files import atomic_write, read_json
from owlfuse.core.types import JsonObject
from owlfuse.data.shapes.write import write_shapes

# Numbers of pictures in a validation chat; each has a file.
COUNTS = (1, 2, 4, 8, 16, 32)


def write_many(
    folder: str,
    shapes_folder: str,
    seed: int = 0,
    chats: int = 6000,
    most: int = 8,
    questions: int = 100,
    shapes: JsonObject | None = None,
) -> None:
    """Write train.json and val_<n>.json for n of `COUNTS` into `folder`, in LLaVA's format; the
    pictures stay in `shapes_folder`, which is written first where it is missing. The files are the
    same for the same arguments.

    Args:
        folder: of the chats.
        shapes_folder: of the pictures.
        seed: of the choice of pictures and questions.
        most: pictures of a chat in train.json.
        chats: of train.json, each with 1, 2, 4, ... or `most` pictures and a question about up to
            three of them.
        questions: of each validation file, one a chat; the question about a picture is the same
            whatever the other pictures are.
        shapes: arguments of `write_shapes`.

    Raises:
        ValueError: a folder holds something else, or a number is too small.
    """
    if min(chats, most, questions) < 1:
        raise ValueError(
            f"chats, most and questions are {chats}, {most} and {questions}, expected at least 1 "
            "of each"
        )
    write_shapes(shapes_folder, **{"seed": seed, **(shapes or {})})
    records = {}
    for split in ("train", "val"):
        records[split] = read_json(Path(shapes_folder) / f"{split}.json", list)
    counts = [count for count in COUNTS if count <= most]
    rng = Random(f"many {seed}")
    train = []
    for number in range(chats):
        train.append(chat(f"train-{number:05d}", records["train"], rng.choice(counts), 3, rng))
    texts = {"train.json": to_text(train)}
    for count in COUNTS:
        val = []
        for number in range(questions):
            # the same questions for every count
            question_rng = Random(f"many {seed} {number}")
            val.append(chat(f"val-{number:05d}", records["val"], count, 1, question_rng))
        texts[f"val_{count}.json"] = to_text(val)
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    check_free(target, texts)
    for name, text in texts.items():
        # One that is there has this content; cached counts of its tokens stay valid.
        if not (target / name).exists():
            with atomic_write(target / name) as file:
                file.write(text)


def chat(name: str, records: list[JsonObject], count: int, turns: int, rng: Random) -> JsonObject:
    """Return a chat about `count` pictures, with a question about each of at most `turns` of
    them."""
    if len(records) < count:
        raise ValueError(
            f"a chat about {count} pictures needs as many, and shapes has {len(records)}"
        )
    targets, target_turns = [], []
    for record in rng.sample(records, min(turns, count)):
        targets.append(record)
        target_turns.append(rng.randrange(len(record["kinds"])))
    distractors = []
    # as many more as there may be targets among them
    for record in rng.sample(records, min(count + turns, len(records))):
        if record not in targets:
            distractors.append(record)
    pictures = targets + distractors[: count - len(targets)]
    rng.shuffle(pictures)
    conversations, kinds = [], []
    for record, turn in zip(targets, target_turns, strict=True):
        question, answer = record["conversations"][2 * turn : 2 * turn + 2]
        text = question["value"].removeprefix("<image>\n")
        number = pictures.index(record) + 1
        conversations += [{"from": "human", "value": f"Picture {number}: {text}"}, answer]
        kinds.append(record["kinds"][turn])
    conversations[0]["value"] = "<image>\n" * count + conversations[0]["value"]
    return {
        "id": name,
        "image": [record["image"] for record in pictures],
        "conversations": conversations,
        "kinds": kinds,
    }


def to_text(records: list[JsonObject]) -> str:
    """Return the content of a file of chats."""
    return json.dumps(records, indent=1) + "\n"


def check_free(folder: Path, texts: dict[str, str]) -> None:
    """Raise ValueError for a folder that holds anything but files of these names and contents.

    A run's configuration, which may come from anybody, names the folder.
    """
    for path in sorted(folder.iterdir()):
        # .owlfuse has the cached counts of tokens, and a file being written begins with a dot
        if path.name.startswith("."):
            continue
        if path.name not in texts or path.read_bytes() != texts[path.name].encode():
            raise ValueError(
                f"{folder} holds something else ({path.name}): choose another folder or delete it"
            )
