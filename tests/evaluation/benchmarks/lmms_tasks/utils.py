"""What the tasks of this folder ask; the yamls name these functions."""

import json
from pathlib import Path

from datasets import Dataset
from PIL import Image

FOLDER = Path("data")


def questions(chats):
    """The first question of each chat."""
    rows = []
    for chat in chats:
        asked, answer = (turn["value"] for turn in chat["conversations"][:2])
        images = chat.get("image") or []
        rows.append(
            {
                "question": asked,
                "answer": answer,
                "images": [images] if isinstance(images, str) else images,
            }
        )
    return Dataset.from_list(rows)


def pictures(row):
    """The pictures of a question."""
    return [Image.open(FOLDER / image).convert("RGB") for image in row["images"]]


def messages(row):
    """The same as a chat, the pictures by their paths and where they stand."""
    images = iter(row["images"])
    content = []
    for number, text in enumerate(row["question"].split("<image>")):
        if number:
            content.append({"type": "image", "url": str(FOLDER / next(images))})
        if text:
            content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def exact(row, answers):
    """The score, and the answer for the test to read."""
    with (FOLDER / "answers.jsonl").open("a") as file:
        file.write(json.dumps({"question": row["question"], "answer": answers[0]}) + "\n")
    return {"exact_match": float(answers[0] == row["answer"])}


def rounds(
    row,
    previous_output=None,
    round_idx=None,
    previous_round_info=None,
    lmms_eval_specific_kwargs=None,
):
    """The question, then twice the answer before it with the pictures again;
    `previous_round_info` counts."""
    if round_idx is None:
        return row["question"]
    told = (previous_round_info or 0) + 1
    again = None if round_idx == 3 else f"You said {previous_output[-1]!r}. {row['question']}"
    return pictures(row), again, round_idx == 3, previous_output, told


def three(row, results):
    """All the answers of a document."""
    (answers,) = results
    return {
        "three": float(isinstance(answers, list) and len(answers) == 3),
        "chain": json.dumps(answers),
    }


def first(items):
    """An aggregation that gives what the first document has."""
    return items[0]


def likelihood(row, results):
    """Of a task of the type `loglikelihood`: the number as it is."""
    ((number, greedy),) = results
    return {"nats": number, "greedy": float(greedy)}
