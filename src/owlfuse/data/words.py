"""The image token as a word of a text: it is hidden while a chat is rendered, and then written by
ordinary tokens."""

from __future__ import annotations

import re
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import Message
from owlfuse.data.chat.supervision import inner_tokens, shifted
from owlfuse.data.chat.tokenizer import Offsets

# The character that replaces, while a chat is rendered, each character of an image token that is a
# word of a text, so that no offset changes.
WORD = "\ue010"


def hide_words(text: str, image_token: str) -> str:
    """Return a text whose image tokens are words with each as so many `WORD`s, which a chat
    template takes for no placeholder."""
    return text.replace(image_token, WORD * len(image_token))


def show_words(text: str, image_token: str) -> str:
    """Return a rendered chat in which hidden words are words again; no offset changes."""
    return text.replace(WORD * len(image_token), image_token)


def with_hidden_words(messages: list[Message], image_token: str) -> list[Message]:
    """Return messages of parts with the image tokens in their texts hidden."""
    hidden = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                part = {**part, "text": hide_words(part["text"], image_token)}
            parts.append(part)
        hidden.append({**message, "content": parts})
    return hidden


def spell_words(
    tokenizer: Any,
    image_token: str,
    text: str,
    ids: list[int],
    offsets: Offsets,
    name: str,
) -> None:
    """Replace, in place, each image token that is a word by ordinary tokens.

    Args:
        text: with its words hidden.
        ids, offsets: of the text as it reads.
        name: the text's, for a message.

    Raises:
        DataError: a tokenizer that has no other tokens for the word.
    """
    matches = re.finditer(WORD * len(image_token), text)
    starts = [match.start() for match in matches]
    if not starts or not ids:
        return
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    spelled = inner_tokens(tokenizer, image_token, split_special_tokens=True)
    start_by_position: dict[int, int] = {}
    for position, token in enumerate(ids):
        if token != image_id:
            continue
        first, last = offsets[position]  # a token may have white space beside it
        for start in starts:
            if first <= start < last:
                start_by_position[position] = start
    # A truncation of the caller may have cut off the others.
    first, last = offsets[0][0], offsets[-1][1]
    inside = [start for start in starts if first <= start < last]
    if len(start_by_position) != len(inside) or spelled is None or image_id in spelled[0]:
        raise DataError(
            f"{name} has the word {image_token} in a text, which this tokenizer cannot write as a "
            "word; leave it out"
        )
    # from the last on, so that earlier positions stay
    for position, start in sorted(start_by_position.items(), reverse=True):
        ids[position : position + 1] = spelled[0]
        offsets[position : position + 1] = shifted(spelled[1], start)
