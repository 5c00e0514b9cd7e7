"""Whether a text holds an accepted answer as whole words and whole numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from owlfuse.evaluation.questions import normalize

# Thai and Lao, Burmese, Khmer, kana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
"""A letter of a script that puts no space between words."""

NUMBER_BEFORE = re.compile(r"(\d[.,]|(^|\s)[-\u2212]?\.|(^|\s)[-\u2212])$")
"""The beginning of a number whose next digit follows: `1.`, `1,`, ` .` or ` -`."""
NUMBER_AFTER = re.compile(r"[.,]\d")
"""The rest of a number whose digits stand before."""


def holds_answer(text: str, accepted: Sequence[str]) -> bool:
    """Returns whether one of the accepted answers stands in the text as whole words, but for case
    and white space. A part of a number is none (`5` of `0.5`). In scripts without spaces, any place
    in a sentence will do."""
    normalized = normalize(text)
    for answer in map(normalize, accepted):
        if answer == "":
            if normalized == "":
                return True
            continue
        # with places that overlap
        for match in re.finditer(f"(?={re.escape(answer)})", normalized):
            if is_whole(normalized, match.start(), match.start() + len(answer)):
                return True
    return False


def is_whole(text: str, start: int, end: int) -> bool:
    """Returns whether no word and no number of the text crosses the edges of text[start:end]."""
    if is_inside_word(text, start) or is_inside_word(text, end):
        return False
    if text[start].isdigit() and NUMBER_BEFORE.search(text[:start]):
        return False
    return not (text[end - 1].isdigit() and NUMBER_AFTER.match(text, end))


def is_inside_word(text: str, edge: int) -> bool:
    """Returns whether the characters before and after an edge belong to one word."""
    if edge in (0, len(text)):
        return False
    before, after = text[edge - 1], text[edge]
    # a vowel sign or an accent, which belongs to the letter before it
    if unicodedata.category(after).startswith("M"):
        return True
    if UNSPACED.match(before) or UNSPACED.match(after):
        return False
    return is_word_character(before) and is_word_character(after)


def is_word_character(character: str) -> bool:
    """Returns whether it is a letter, a digit, a mark or an underscore."""
    return character == "_" or unicodedata.category(character)[0] in "LNM"
