"""Tokens that stand across a border become tokens on either side of it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

Offsets = list[tuple[int, int]]

ANCHORS = ("a", "\n", ".", "0", "é")


def split_tokens(tokenizer: Any, text: str, ids: list[int], offsets: Offsets, border: int) -> None:
    """Replaces, in place, what stands across character `border` of the text by the tokens of its two sides.

    So an answer's tokens are those that follow the prompt's own in generation. Where the sides cannot be encoded by themselves
    nothing is changed.
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
        encoding = tokenizer(anchor + piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
        ids, offsets = encoding["input_ids"], [tuple(pair) for pair in encoding["offset_mapping"]]
        count = sum(start < len(anchor) for start, _ in offsets)
        aligned = all(end <= len(anchor) for _, end in offsets[:count])
        if aligned and offsets[count:] and offsets[count][0] == len(anchor) and offsets[-1][1] == len(anchor) + len(piece):
            return ids[count:], [(start - len(anchor), end - len(anchor)) for start, end in offsets[count:]]
    return None
