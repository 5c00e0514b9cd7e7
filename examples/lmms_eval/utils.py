"""What the tasks of this folder ask: each question of a file of chats in LLaVA's format by itself,
as `owlfuse eval RUN task=exact_match` does. The yamls name these functions."""

from pathlib import Path

from datasets import Dataset
from PIL import Image


def questions(chats):
    """A row for each question, with the picture that its chat is about, its kind, and the answers
    that questions of that kind have in the file."""
    rows = []
    for chat in chats:
        turns = [turn["value"] for turn in chat["conversations"]]
        for number, (asked, answer) in enumerate(zip(turns[::2], turns[1::2])):
            identity = f"{chat['id']}#{number}"
            rows.append(
                {
                    "id": identity,
                    "image": chat["image"],
                    "question": asked,
                    "answer": answer,
                    "kind": chat["kinds"][number],
                }
            )
    choices = {
        kind: sorted({row["answer"] for row in rows if row["kind"] == kind})
        for kind in {row["kind"] for row in rows}
    }
    return Dataset.from_list([{**row, "choices": choices[row["kind"]]} for row in rows])


def picture(row, places):
    """The picture of a question, in a list."""
    with Image.open(Path(places["image_root"]) / row["image"]) as image:
        return [image.convert("RGB")]


def right_choice(row):
    """The place of the right answer among the choices."""
    return row["choices"].index(row["answer"])


def exact_match(row, answers):
    """1 where the answer is the expected one, but for case and white space."""
    found, expected = (" ".join(text.casefold().split()) for text in (answers[0], row["answer"]))
    return {"exact_match": float(found == expected)}
