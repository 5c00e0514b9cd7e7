"""Which characters of a rendered chat are supervised: each answer as rendered, its thought and
tool calls, and its end mark."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.answer_format import THINK_TAGS, AnswerFormat

Message = dict[str, Any]
Render = Callable[..., str]
"""Messages, and what else a template takes -> text."""
Marked = list[tuple[int, str, str]]
"""Of each text that the assistant writes: its turn, the mark in its place, and the text."""


def supervised_spans(
    sample: Sample, messages: list[Message], text: str, render: Render, answer_format: AnswerFormat
) -> list[tuple[int, int]]:
    """Returns start and end of each supervised assistant turn in `text`, the whole chat rendered.

    The chat is rendered again with a mark in the place of each text that the assistant writes. What
    stands around the marks is the template's and the user's, and must give `text` with the texts
    put back, to the character: so nothing that a text says is mistaken for the template's own. A
    span begins where the generation prompt ends, and what the template writes there by itself
    belongs to the prompt (see `AnswerFormat`); it ends behind the end mark.

    Raises:
        DataError: no answer, an empty one, none that is supervised, or a template that leaves out
            or changes what one says.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"sample {sample.id} has no assistant turn, so there is nothing to learn from it"
        )
    around, marked = surroundings(sample, messages, text, render)
    if (
        around[0]
        + "".join(written + rest for (_, _, written), rest in zip(marked, around[1:], strict=True))
        != text
    ):
        raise DataError(
            f"sample {sample.id}: the chat template changes an answer otherwise than by stripping "
            "it of white space"
        )
    check_prompt(sample, messages[: turns[-1]], text, render)
    spans = []
    place = 0
    for number, (turn, _, written) in enumerate(marked):
        before = around[number]
        place += len(before)
        if number == 0 or marked[number - 1][0] != turn:  # the first text of its turn
            start = place - len(before) + answer_format.answer_start(before)
        place += len(written)
        if number + 1 < len(marked) and marked[number + 1][0] == turn:
            continue
        end = answer_end(sample, messages, turn, text, place, answer_format)
        if messages[turn].get("supervised", True):
            spans.append((start, end))
    if not spans:
        raise DataError(
            f"sample {sample.id}: the data exclude every answer from the loss, so there is "
            "nothing to learn from it"
        )
    return spans


def check_prompt(sample: Sample, asked: list[Message], text: str, render: Render) -> None:
    """Raises DataError where what comes before the last answer is rendered otherwise alone than
    in the whole chat."""
    if not text.startswith(render(asked, True, without_lead=True)):
        raise DataError(
            f"sample {sample.id}: the chat template renders what comes before turn "
            f"{len(asked) + 1} otherwise alone than in "
            "the whole chat, so that its answer cannot be told from the prompt"
        )


def answer_end(
    sample: Sample,
    messages: list[Message],
    turn: int,
    text: str,
    place: int,
    answer_format: AnswerFormat,
) -> int:
    """Returns where the end mark of a turn ends, whose last text ends at `place`.

    Raises DataError.
    """
    mark = answer_format.end_mark
    start = text.find(mark, place)
    between = text[place:start]
    if start < 0 or (between.strip() and not messages[turn].get("tool_calls")):
        raise DataError(
            f"sample {sample.id}: the chat template does not end turn {turn + 1} with {mark!r}, "
            "with which it ends "
            "other answers"
        )
    return start + len(mark)


def surroundings(
    sample: Sample, messages: list[Message], text: str, render: Render
) -> tuple[list[str], Marked]:
    """Returns what is rendered before the first text of the assistant, between two, and behind
    the last; and these texts."""
    unused = "\ue000"
    while unused in text:
        unused += "\ue000"
    marked: Marked = []
    replaced = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            message = with_marks(sample, turn, message, unused, marked)
        replaced.append(message)
    rest = render(replaced)
    pieces = []
    for turn, mark, _ in marked:
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            thought = (
                messages[turn].get("reasoning_content")
                or THINK_TAGS[1] in messages[turn]["content"]
            )
            remedy = (
                "; take another chat_template, or leave thoughts of earlier turns out of the data"
                if thought
                else ""
            )
            raise DataError(
                f"sample {sample.id}: the chat template writes "
                f"{'a text' if thought else 'the text'} of turn {turn + 1} not "
                f"once, so it cannot be supervised{remedy}"
            )
        pieces.append(piece)
    return [*pieces, rest], marked


def with_marks(sample: Sample, turn: int, message: Message, unused: str, marked: Marked) -> Message:
    """Returns an assistant's message with a mark in the place of each of its texts, and adds these
    to `marked`.

    White space around a text stays, so that a template strips the mark of what it strips the text
    of. Raises DataError.
    """

    def mark_of(written: str) -> str:
        mark = f"\ue001{unused}{len(marked)}\ue001"
        marked.append((turn, mark, written.strip()))
        return written.replace(written.strip(), mark, 1)

    message = copy.deepcopy(message) if message.get("tool_calls") else dict(message)
    content, thought = message["content"], message.get("reasoning_content")
    if thought and thought.strip():
        message["reasoning_content"] = mark_of(thought)
    elif THINK_TAGS[1] in content:
        thought, _, content = content.partition(THINK_TAGS[1])
        opened, tag, thought = thought.rpartition(THINK_TAGS[0])
        thought = mark_of(thought) if thought.strip() else thought
        message["content"] = (
            opened
            + tag
            + thought
            + THINK_TAGS[1]
            + (mark_of(content) if content.strip() else content)
        )
        content = ""
    if content.strip():
        message["content"] = mark_of(content)
    if not content.strip() and message.get("tool_calls"):
        function = message["tool_calls"][0].get("function", message["tool_calls"][0])
        function["name"] = mark_of(str(function.get("name", "")))
    if not marked or marked[-1][0] != turn:
        raise DataError(f"sample {sample.id}: turn {turn + 1} is an empty answer")
    return message


Offsets = list[tuple[int, int]]

ANCHORS = ("a", "\n", ".", "0", "é")


def cut_at_borders(
    tokenizer: Any, text: str, ids: list[int], offsets: Offsets, borders: list[int]
) -> None:
    """Makes, in place, of a text's tokens those of its pieces between the borders.

    So what stands before a border has the tokens that it has as a prompt, whatever follows: none
    stands across the border, and none is another because of what comes behind (GPT-2's pattern
    takes two line breaks at a text's end as one token, and before a word as two). Where a piece
    cannot be encoded by itself nothing is changed.
    """
    added = tokenizer.added_tokens_decoder
    before = 0
    for border in sorted(set(borders)):
        split_token(tokenizer, text, ids, offsets, border)
        end = bisect_left(offsets, (border, 0))
        begin = end
        # an added token is encoded by itself, so that what stands behind it does not depend on what
        # stands before it
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
    """Replaces, in place, what stands across character `border` of the text by the tokens of its
    two sides.

    Where the sides cannot be encoded by themselves nothing is changed.
    """
    # the first token that begins at the border or behind it
    last = bisect_left(offsets, (border, 0))
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
    before, after = (
        inner_tokens(tokenizer, text[start:border]),
        inner_tokens(tokenizer, text[border:end]),
    )
    if before is None or after is None:
        return
    ids[first:last] = before[0] + after[0]
    offsets[first:last] = [(a + start, b + start) for a, b in before[1]] + [
        (a + border, b + border) for a, b in after[1]
    ]


def inner_tokens(tokenizer: Any, piece: str, **options: Any) -> tuple[list[int], Offsets] | None:
    """A piece's tokens as they are inside a text, without the space that some tokenizers put at a
    text's start.

    `options` are the tokenizer's. None: the piece cannot be encoded by itself.
    """
    for anchor in ANCHORS:
        ids, offsets = encode(tokenizer, anchor + piece, **options)
        count = sum(start < len(anchor) for start, _ in offsets)
        aligned = all(end <= len(anchor) for _, end in offsets[:count])
        if (
            aligned
            and offsets[count:]
            and offsets[count][0] == len(anchor)
            and offsets[-1][1] == len(anchor) + len(piece)
        ):
            return ids[count:], [
                (start - len(anchor), end - len(anchor)) for start, end in offsets[count:]
            ]
    return None


def encode(tokenizer: Any, text: str, **options: Any) -> tuple[list[int], Offsets]:
    """Ids and the characters that each stands for."""
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options
    )
    return list(encoding["input_ids"]), [tuple(pair) for pair in encoding["offset_mapping"]]
