"""Tokens of a chat as generation has them: a prompt ends where an answer begins, so no token looks across that border."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

Offsets = list[tuple[int, int]]

ANCHORS = ("a", "\n", ".", "0", "é")


def cut_at_borders(tokenizer: Any, text: str, ids: list[int], offsets: Offsets, borders: list[int]) -> None:
    """Makes, in place, of a text's tokens those of its pieces between the borders.

    So what stands before a border has the tokens that it has as a prompt, whatever follows: none stands across the border,
    and none is another because of what comes behind (GPT-2's pattern takes two line breaks at a text's end as one token, and
    before a word as two). Where a piece cannot be encoded by itself nothing is changed.
    """
    added = tokenizer.added_tokens_decoder
    before = 0
    for border in sorted(set(borders)):
        split_token(tokenizer, text, ids, offsets, border)
        end = bisect_left(offsets, (border, 0))
        begin = end
        # an added token is encoded by itself, so that what stands behind it does not depend on what stands before it
        while begin and offsets[begin - 1][0] >= before:
            begin -= 1
            if ids[begin] in added:
                break
        if begin < end and offsets[end - 1][1] <= border:
            piece = text[offsets[begin][0] : border]
            anchored = begin == 0 or ids[begin] in added
            encoded = encode(tokenizer, piece) if anchored else inner_tokens(tokenizer, piece)
            if encoded is not None and encoded[0] != ids[begin:end]:
                start = offsets[begin][0]
                ids[begin:end] = encoded[0]
                offsets[begin:end] = [(first + start, last + start) for first, last in encoded[1]]
        before = border


def split_token(tokenizer: Any, text: str, ids: list[int], offsets: Offsets, border: int) -> None:
    """Replaces, in place, what stands across character `border` of the text by the tokens of its two sides.

    Where the sides cannot be encoded by themselves nothing is changed.
    """
    last = bisect_left(offsets, (border, 0))  # the first token that begins at the border or behind it
    first = last - 1
    if first < 0 or offsets[first][1] <= border:
        return
    start, end = offsets[first]
    # tokens of one character's bytes overlap: all that do belong together
    while first and offsets[first - 1][1] > start:
        first -= 1
        start = offsets[first][0]
    while last < len(ids) and offsets[last][0] < end:
        end = max(end, offsets[last][1])
        last += 1
    before, after = inner_tokens(tokenizer, text[start:border]), inner_tokens(tokenizer, text[border:end])
    if before is None or after is None:
        return
    ids[first:last] = before[0] + after[0]
    offsets[first:last] = [(a + start, b + start) for a, b in before[1]] + [(a + border, b + border) for a, b in after[1]]


def inner_tokens(tokenizer: Any, piece: str, **options: Any) -> tuple[list[int], Offsets] | None:
    """A piece's tokens as they are inside a text, without the space that some tokenizers put at a text's start.

    `options` are the tokenizer's. None: the piece cannot be encoded by itself.
    """
    for anchor in ANCHORS:
        ids, offsets = encode(tokenizer, anchor + piece, **options)
        count = sum(start < len(anchor) for start, _ in offsets)
        aligned = all(end <= len(anchor) for _, end in offsets[:count])
        if aligned and offsets[count:] and offsets[count][0] == len(anchor) and offsets[-1][1] == len(anchor) + len(piece):
            return ids[count:], [(start - len(anchor), end - len(anchor)) for start, end in offsets[count:]]
    return None


def encode(tokenizer: Any, text: str, **options: Any) -> tuple[list[int], Offsets]:
    """Ids and the characters that each stands for."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
    return list(encoding["input_ids"]), [tuple(pair) for pair in encoding["offset_mapping"]]
