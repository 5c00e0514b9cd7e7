"""The questions of a source that are asked of a model, and the answers that are accepted."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import pairwise
from typing import Any

from owlfuse.core.types import VISUAL, Sample
from owlfuse.data.chat.encoder import answer_text, has_break_behind_visuals, led_by_break


def normalize(text: str) -> str:
    """Returns the text case-folded, runs of white space as one space, and letters with their marks
    composed (NFC), as many tokenizers do with every text: a model of theirs can write no other."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def question_samples(sample: Sample, history: bool = False) -> list[tuple[Sample, str, str]]:
    """Returns each question of a chat by itself, with its answer and its kind ("" where the data
    name none).

    Pictures of the turns before it come first, those of the question stay where they stand in its
    text. The texts in between are left out, so that no answer gives another away; with `history`
    they stay, as few-shot examples need them. A last question without an answer is left out, and so
    are an answer that the data exclude from the loss, and turns with tools.
    """
    questions = []
    earlier_visuals: list[dict[str, Any]] = []
    accepted = sample.metadata.get("accepted")
    system = [message for message in sample.messages if message["role"] == "system"]
    turns = [message for message in sample.messages if message["role"] != "system"]
    kinds: list[str] = sample.metadata.get("kinds") or [sample.metadata.get("kind", "")]
    # of the pictures in the order of the chat, a question has those up to its own
    shown: Counter[str] = Counter()
    for message in system:
        shown.update(part_types(message))
    number = -1
    # overlapping pairs: an answer is followed by the next question
    for index, (question, answer) in enumerate(pairwise(turns)):
        content = list(question["content"])
        shown.update(part_types(question))
        if question["role"] == "user" and answer["role"] == "assistant":
            number += 1
            if answer.get("supervised", True) and not answer.get("tool_calls"):
                if history:
                    messages = [*system, *turns[: index + 1]]
                else:
                    # Where the template puts the break, the texts have none.
                    breaks = bool(earlier_visuals) and has_break_behind_visuals(turns)
                    after_visuals = led_by_break(content, breaks)
                    turn = {"role": "user", "content": [*earlier_visuals, *after_visuals]}
                    messages = [*system, turn]
                # behind a history, they are of the last question
                is_judged = accepted and index == len(turns) - 2
                question_sample = Sample(
                    f"{sample.id}#{number}",
                    sample.source,
                    messages,
                    sample.images[: shown["image"]],
                    {"accepted": accepted} if is_judged else {},
                    sample.videos[: shown["video"]],
                    sample.tools,
                    chat=sample.id,
                )
                # a chat may name one kind for all its questions
                kind = kinds[number % len(kinds)]
                questions.append((question_sample, answer_text(answer), kind))
        earlier_visuals += [part for part in content if part["type"] in VISUAL]
    return questions


def part_types(message: dict[str, Any]) -> list[str]:
    """Returns the type of each part of a message."""
    return [part["type"] for part in message["content"]]
