"""The questions of a source that are asked of a model, and the answers that are accepted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import VISUAL, Sample
from owlfuse.data.chat.encoder import led_by_break, said_in


def accepted_by(sample: Sample, turns: int) -> dict[str, Any]:
    """The sample's list `accepted`, of what its one answer may hold to be right; nothing where it
    has none.

    Raises:
        DataError: another thing than a list of texts, or one for a chat of several questions.
    """
    accepted = sample.metadata.get("accepted")
    if accepted is None:
        return {}
    if not (
        isinstance(accepted, list)
        and accepted
        and all(isinstance(text, str) and text.strip() for text in accepted)
    ):
        raise DataError(
            f"sample {sample.id}: accepted is {str(accepted)[:60]}, expected a list of texts"
        )
    if turns > 2:
        raise DataError(
            f"sample {sample.id} has accepted answers and {turns // 2} questions, expected one"
        )
    return {"accepted": accepted}


def question_samples(sample: Sample, history: bool = False) -> list[tuple[Sample, str, str]]:
    """Each question of a chat by itself, with its answer and its kind ("" where the data name
    none).

    Pictures of the turns before it come first, its own stay where they stand in its text. What was
    said in between is left out, so that no answer gives another away; with `history` it is kept, as
    few-shot examples want it. A last question without an answer is left out, and so are an answer
    that the data exclude from the loss, and turns with tools.
    """
    questions = []
    visual_before: list[dict[str, Any]] = []
    system = [message for message in sample.messages if message["role"] == "system"]
    in_system = [part["type"] for message in system for part in message["content"]]
    kinds: list[Any] = sample.metadata.get("kinds") or [sample.metadata.get("kind", "")]
    turns = [message for message in sample.messages if message["role"] != "system"]
    number = -1
    for place, (asked, answered) in enumerate(pairwise(turns)):
        own = list(asked["content"])
        if asked["role"] == "user" and answered["role"] == "assistant":
            number += 1
            if answered.get("supervised", True) and not answered.get("tool_calls"):
                if history:
                    messages = [*system, *turns[: place + 1]]
                else:
                    messages = [
                        *system,
                        {
                            "role": "user",
                            "content": [*visual_before, *led_by_break(own, bool(visual_before))],
                        },
                    ]
                types = [
                    *in_system,
                    *(part["type"] for part in visual_before),
                    *(part["type"] for part in own),
                ]
                images, videos = (
                    sample.images[: types.count("image")],
                    sample.videos[: types.count("video")],
                )
                metadata = accepted_by(sample, len(turns))
                question = Sample(
                    f"{sample.id}#{number}",
                    sample.source,
                    messages,
                    images,
                    metadata,
                    videos,
                    sample.tools,
                )
                questions.append((question, said_in(answered), str(kinds[number % len(kinds)])))
        visual_before += [part for part in own if part["type"] in VISUAL]
    return questions
