"""What a chat must be before it is given to a chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import IMAGE, VISUAL, Sample
from owlfuse.data.media.pictures import visual_parts
from owlfuse.data.words import hide_words

ROLES = ("system", "user", "assistant", "tool")
CARRIED = ("reasoning_content", "tool_calls", "tool_call_id", "name", "supervised")
"""What of a message, beside role and content, goes on to the chat template or decides what is
supervised."""
NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters that no text holds (all but tab, line feed, vertical tab, form feed and
carriage return), and lone surrogates, which no tokenizer takes."""


def control_tokens(tokenizer: Any, image_token: str) -> list[str]:
    """The special tokens, which no text may hold.

    The image token is not among them: in a text it is an ordinary word.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in special if token != image_token]


def flatten(
    sample: Sample, control: Sequence[str], image_token: str = IMAGE
) -> list[dict[str, Any]]:
    """Messages with the parts of each joined to one text, `image_token` in the place of each image
    or video.

    Where a text itself has `image_token`, it is hidden (see `words`), so that the chat template
    takes it for no placeholder.

    Args:
        control: the tokenizer's special tokens. One that stands in a text would become a control
            token, so it is refused.

    Raises:
        DataError: names the sample, and what of it is no chat: see `check_order`, `check_text` and
            `check_pictures`.
    """
    check_order(sample)
    check_pictures(sample)
    messages = []
    for number, message in enumerate(sample.messages):
        # joined, so that a control token is found that two parts make together
        check_text(
            sample,
            number,
            "".join(part["text"] for part in message["content"] if part["type"] == "text"),
            control,
        )
        texts = []
        for part in message["content"]:
            texts.append(
                image_token if part["type"] in VISUAL else hide_words(part["text"], image_token)
            )
        content = "".join(texts)
        carried = {key: message[key] for key in CARRIED if message.get(key) is not None}
        if "reasoning_content" in carried:
            check_text(sample, number, carried["reasoning_content"], control)
        messages.append({"role": message["role"], "content": content, **carried})
    return messages


def check_order(sample: Sample) -> None:
    """A system message or none, then user and assistant in turn, a user first; results of tools
    stand between two turns of the assistant. The last question may lack its answer."""
    if not sample.messages:
        raise DataError(f"sample {sample.id} has no messages")
    roles = [message["role"] for message in sample.messages]
    for number, role in enumerate(roles):
        if role not in ROLES:
            raise DataError(
                f"sample {sample.id}: turn {number + 1} has the role {str(role)[:40]!r}, expected "
                f"{', '.join(ROLES)}"
            )
        if role == "system" and number:
            raise DataError(
                f"sample {sample.id}: turn {number + 1} is a system message, expected at the "
                "start only"
            )
    first = int(roles[0] == "system")
    if roles[first:] and roles[first] != "user":
        raise DataError(
            f"sample {sample.id}: its first turn is the {roles[first]}'s, expected the user's"
        )
    for number in range(first + 1, len(roles)):
        before, role = roles[number - 1], roles[number]
        if role == before and role != "tool":
            raise DataError(
                f"sample {sample.id}: turns {number} and {number + 1} are both the {role}'s, "
                "expected user and "
                "assistant in turn"
            )
        if role == "tool" and before == "user":
            raise DataError(
                f"sample {sample.id}: turn {number + 1} is a tool's result, expected behind a "
                "turn of the assistant"
            )


def check_pictures(sample: Sample) -> None:
    """A placeholder for each image and video, in what the user says."""
    visual_parts(sample)
    for number, message in enumerate(sample.messages, start=1):
        for part in message["content"]:
            if part["type"] in VISUAL and message["role"] != "user":
                what = f"<{part['type']}> in a turn of the {message['role']} (turn {number})"
                raise DataError(
                    f"sample {sample.id} has an {what}; images go with what the user says"
                )


def check_text(sample: Sample, number: int, text: str, control: Sequence[str]) -> None:
    """Text of turn `number` without control tokens, control characters or lone surrogates."""
    if found := NO_TEXT.search(text):
        kind = "lone surrogate" if found[0] >= "\ud800" else "control character"
        raise DataError(
            f"sample {sample.id}: turn {number + 1} holds the {kind} U+{ord(found[0]):04X}, "
            "expected text"
        )
    if tokens := [token for token in control if token in text]:
        raise DataError(
            f"sample {sample.id} holds the tokenizer's control token {tokens[0]} in its text "
            f"(turn {number + 1})"
        )
