"""Checks of a chat before a chat template renders it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import IMAGE, VISUAL, Message, Sample
from owlfuse.data.chat.answer_format import THINK_TAGS
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.media.pictures import visual_parts
from owlfuse.data.words import hide_words

ROLES = ("system", "user", "assistant", "tool")
# Keys of a message, beside role and content, that a chat template or the supervision reads.
CALL_KEYS = ("tool_calls", "tool_call_id", "name")
TEMPLATE_KEYS = ("reasoning_content", *CALL_KEYS, "supervised")
# Control characters that no text holds (all but tab, line feed, vertical tab, form feed and
# carriage return), and lone surrogates, which no tokenizer takes.
NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def control_tokens(tokenizer: Any, image_token: str) -> list[str]:
    """Return the special tokens, which no text may hold, and those that the chat template writes
    around turns, which some tokenizers do not mark as special (DeepSeek-R1-Distill's roles).

    The image token is not among them: in a text it is an ordinary word.
    """
    written = ""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with suppress(DataError):  # of a template that cannot be used, its reader says so
            written = render(tokenizer, chat)
    tokens = []
    for token in tokenizer.added_tokens_decoder.values():
        # a template may write an empty thought, and answers have thoughts with these tags
        is_written = token.content in written and token.content.strip() not in ("", *THINK_TAGS)
        if (token.special or is_written) and token.content != image_token:
            tokens.append(token.content)
    return tokens


def flatten(sample: Sample, control: Sequence[str], image_token: str = IMAGE) -> list[Message]:
    """Return messages with the parts of each joined to one text, `image_token` in the place of each
    image or video.

    Where a text itself has `image_token`, it is hidden (see `words`), so that the chat template
    takes it for no placeholder.

    Args:
        control: the tokenizer's special tokens. One that stands in a text would become a control
            token, so it is refused.

    Raises:
        DataError: names the sample and the fault: see `check_order`, `check_text` and
            `check_pictures`.
    """
    check_order(sample)
    check_pictures(sample)
    # A picture's word is not hidden in these: a template may write them as escaped JSON.
    call_control = [*control, image_token]
    check_text(sample, "its list of tools", joined_texts(sample.tools), call_control)
    messages = []
    for number, message in enumerate(sample.messages, start=1):
        texts, pieces = [], []
        for part in message["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
                pieces.append(hide_words(part["text"], image_token))
            elif part["type"] in VISUAL:
                pieces.append(image_token)
        # Joined, so that a control token is found that two parts make together.
        check_text(sample, f"turn {number}", "".join(texts), control)
        flat = {"role": message["role"], "content": "".join(pieces)}
        for key in TEMPLATE_KEYS:
            if message.get(key) is not None:
                flat[key] = message[key]
        if "reasoning_content" in flat:
            check_text(sample, f"turn {number}", flat["reasoning_content"], control)
            flat["reasoning_content"] = hide_words(flat["reasoning_content"], image_token)
        calls = joined_texts([flat.get(key) for key in CALL_KEYS])
        check_text(sample, f"a tool call or name in turn {number}", calls, call_control)
        messages.append(flat)
    return messages


def joined_texts(value: Any) -> str:
    """Return all texts inside of a value of JSON, those of keys too, a line each."""
    texts, remaining = [], [value]
    # No recursion, which a deep value would exhaust.
    while remaining:
        item = remaining.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            remaining += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            remaining += item
    return "\n".join(texts)


def check_order(sample: Sample) -> None:
    """Raise DataError unless there is a system message or none, then user and assistant in turn, a
    user first; results of tools come between two turns of the assistant. The last question may lack
    its answer."""
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
        # Several results may follow one answer with several calls.
        if role == before and role != "tool":
            raise DataError(
                f"sample {sample.id}: turns {number} and {number + 1} are both the {role}'s, "
                "expected user and assistant in turn"
            )
        if role == "tool" and before == "user":
            raise DataError(
                f"sample {sample.id}: turn {number + 1} is a tool's result, expected behind a "
                "turn of the assistant"
            )


def check_pictures(sample: Sample) -> None:
    """Raise DataError unless each image and video has a placeholder, in a text of the user."""
    visual_parts(sample)
    for number, message in enumerate(sample.messages, start=1):
        for part in message["content"]:
            if part["type"] in VISUAL and message["role"] != "user":
                raise DataError(
                    f"sample {sample.id} has an <{part['type']}> in a turn of the "
                    f"{message['role']} (turn {number}); images go with what the user says"
                )


def check_text(
    sample: Sample,
    where: str,
    text: str,
    control: Sequence[str],
) -> None:
    """Raise DataError for a text with control tokens, control characters or lone surrogates; it
    says `where` in the sample."""
    if match := NOT_TEXT.search(text):
        kind = "lone surrogate" if match[0] >= "\ud800" else "control character"
        raise DataError(
            f"sample {sample.id}: {where} holds the {kind} U+{ord(match[0]):04X}, expected text"
        )
    if tokens := [token for token in control if token in text]:
        raise DataError(
            f"sample {sample.id} holds the tokenizer's control token {tokens[0]} in its text "
            f"({where})"
        )


def unwritten_roles(
    messages: list[Message], text: str, render: Callable[[list[Message]], str]
) -> list[str]:
    """Return `a system message` and the like for each role whose texts a template leaves out.

    Args:
        text: the chat, as `render` writes it.
    """
    roles = []
    for role in ("system", "tool"):
        without = []
        for message in messages:
            has_text = message["role"] == role and bool(message["content"])
            without.append({**message, "content": ""} if has_text else message)
        if without == messages:
            continue
        # A template that refuses the chat without them writes them.
        with suppress(DataError):
            if render(without) == text:
                roles.append(f"a {role} message")
    return roles
