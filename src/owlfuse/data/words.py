"""The image token as a word of a text: hidden while a chat is rendered, and then written by
ordinary tokens."""

from __future__ import annotations

import re
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.data.chat.supervision import Offsets, inner_tokens

WORD = "\ue010"
"""Stands, while a chat is rendered, for each character of an image token that is a word of a
text, so that no place moves."""


def hide_words(text: str, image_token: str) -> str:
    """A text whose image tokens are words, each as so many `WORD`s, which a chat template takes
    for no placeholder."""
    return text.replace(image_token, WORD * len(image_token))


def show_words(text: str, image_token: str) -> str:
    """A rendered chat as it reads, hidden words being words again; no place in it moves."""
    return text.replace(WORD * len(image_token), image_token)


def with_hidden_words(messages: list[dict[str, Any]], image_token: str) -> list[dict[str, Any]]:
    """Messages of parts whose texts have no image token, the words hidden."""
    hidden = []
    for message in messages:
        parts = []
        for part in message["content"]:
            parts.append(
                {**part, "text": hide_words(part["text"], image_token)}
                if part["type"] == "text"
                else part
            )
        hidden.append({**message, "content": parts})
    return hidden


def spell_words(
    tokenizer: Any, image_token: str, text: str, ids: list[int], offsets: Offsets, what: str
) -> None:
    """Replaces, in place, each image token that is a word by ordinary tokens.

    Args:
        text: with its words hidden.
        ids, offsets: of the text as it reads.
        what: has the text, for a message.

    Raises:
        DataError: a tokenizer that has no other tokens for the word.
    """
    starts = [found.start() for found in re.finditer(WORD * len(image_token), text)]
    if not starts or not ids:
        return
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    spelled = inner_tokens(tokenizer, image_token, split_special_tokens=True)
    places = [place for place, number in enumerate(ids) if number == image_id]
    word_at: dict[int, int] = {}
    for place in places:
        first, last = offsets[place]  # a token may have white space beside it
        for start in starts:
            if first <= start < last:
                word_at[place] = start
    # else cut off by the caller's truncation
    inside = [start for start in starts if offsets[0][0] <= start < offsets[-1][1]]
    if len(word_at) != len(inside) or spelled is None or image_id in spelled[0]:
        raise DataError(
            f"{what} has the word {image_token} in a text, which this tokenizer cannot write as a "
            "word; leave it out"
        )
    for place, start in sorted(word_at.items(), reverse=True):
        ids[place : place + 1] = spelled[0]
        offsets[place : place + 1] = [(first + start, last + start) for first, last in spelled[1]]
