"""The characters of a rendered chat that are supervised: each answer as rendered, its thought and
tool calls, and its end mark."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import Message, Sample
from owlfuse.data.chat.answer_format import THINK_TAGS, AnswerFormat
from owlfuse.data.chat.tokenizer import Offsets, encode

# Messages, and what else a template takes -> text.
Render = Callable[..., str]
# (turn, mark, text) of each text of the assistant that is replaced by a mark.
Marked = list[tuple[int, str, str]]


def supervised_spans(
    sample: Sample,
    messages: list[Message],
    text: str,
    render: Render,
    answer_format: AnswerFormat,
) -> list[tuple[int, int]]:
    """Return start and end of each supervised assistant turn in `text`, the whole chat rendered.

    The chat is rendered again with a mark in the place of each text of the assistant. The text
    around the marks is the template's and the user's, and must give `text` with the assistant's
    texts put back, to the character: so nothing that a text says is mistaken for the template's
    own. A span begins where the generation prompt ends, and what the template writes there by
    itself belongs to the prompt (see `AnswerFormat`); it ends behind the end mark.

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
    pieces = [around[0]]
    for (_, _, answer), following in zip(marked, around[1:], strict=True):
        pieces += [answer, following]
    if "".join(pieces) != text:
        raise DataError(
            f"sample {sample.id}: the chat template changes an answer otherwise than by stripping "
            "it of white space"
        )
    # Generation renders the prompt alone, and must give the model what it was trained on.
    if not text.startswith(render(messages[: turns[-1]], True, without_lead=True)):
        raise DataError(
            f"sample {sample.id}: the chat template renders what comes before turn "
            f"{turns[-1] + 1} otherwise alone than in the whole chat, so that its answer cannot "
            "be told from the prompt"
        )
    mark = answer_format.end_mark
    check_results(sample, messages, text, render, mark)
    spans = []
    position = 0
    for number, (turn, _, answer) in enumerate(marked):
        before = around[number]
        is_first = number == 0 or marked[number - 1][0] != turn
        is_last = number + 1 == len(marked) or marked[number + 1][0] != turn
        if is_first:
            start = position + answer_format.answer_start(before)
            # Behind a tool's result a template may write no header (Mistral's): generation goes
            # on where the prompt ends.
            if answer_format.header not in before:
                prompt = render(messages[:turn], True, without_lead=True)
                if position <= len(prompt) <= start and text.startswith(prompt):
                    start = len(prompt)
        position += len(before) + len(answer)
        if not is_last:
            continue
        end = text.find(mark, position)
        # Behind the name of a tool, the template writes the rest of the call.
        between = text[position:end].strip()
        if end < 0 or (between and not messages[turn].get("tool_calls")):
            raise DataError(
                f"sample {sample.id}: the chat template does not end turn {turn + 1} with "
                f"{mark!r}, with which it ends other answers"
            )
        if messages[turn].get("supervised", True):
            spans.append((start, end + len(mark)))
    if not spans:
        raise DataError(
            f"sample {sample.id}: the data exclude every answer from the loss, so there is "
            "nothing to learn from it"
        )
    return spans


def check_results(
    sample: Sample, messages: list[Message], text: str, render: Render, end_mark: str
) -> None:
    """Raise DataError where a template writes a tool's result before the mark that ends the call,
    up to which a turn is learned."""
    if not any(message["role"] == "tool" for message in messages):
        return
    unused = unused_text(text)
    result = f"\ue003{unused}\ue003"
    replaced, marked = all_with_marks(sample, messages, unused)
    for turn, message in enumerate(replaced):
        if message["role"] == "tool":
            replaced[turn] = {**message, "content": result}
    rendered = render(replaced)
    last_marks = {turn: mark for turn, mark, _ in marked}
    for turn, mark in last_marks.items():
        behind = rendered.partition(mark)[2]
        before_end = behind.partition(end_mark)[0]
        if messages[turn].get("tool_calls") and result in before_end:
            raise DataError(
                f"sample {sample.id}: the chat template writes the result of a tool before "
                f"{end_mark!r}, which ends the answers, so that turn {turn + 1} cannot be learned "
                "without it"
            )


def unused_text(text: str) -> str:
    """Return private-use characters, which a template writes as they are, that a text does not
    have."""
    unused = "\ue000"
    while unused in text:
        unused += "\ue000"
    return unused


def surroundings(
    sample: Sample, messages: list[Message], text: str, render: Render
) -> tuple[list[str], Marked]:
    """Return the texts that are rendered before the first text of the assistant, between two, and
    behind the last; and the texts of the assistant."""
    replaced, marked = all_with_marks(sample, messages, unused_text(text))
    remaining = render(replaced)
    around = []
    for turn, mark, _ in marked:
        before, written, remaining = remaining.partition(mark)
        if not written or mark in remaining:
            message = messages[turn]
            article, remedy = "the text", ""
            if message.get("reasoning_content") or THINK_TAGS[1] in message["content"]:
                article = "a text"
                remedy = (
                    "; take another chat_template, or leave thoughts of earlier turns out of the "
                    "data"
                )
            raise DataError(
                f"sample {sample.id}: the chat template writes {article} of turn {turn + 1} not "
                f"once, so it cannot be supervised{remedy}"
            )
        around.append(before)
    return [*around, remaining], marked


def all_with_marks(
    sample: Sample, messages: list[Message], unused: str
) -> tuple[list[Message], Marked]:
    """Return a chat with a mark in the place of each text of the assistant, and these texts."""
    marked: Marked = []
    replaced = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            message = with_marks(sample, turn, message, unused, marked)
        replaced.append(message)
    return replaced, marked


def with_marks(
    sample: Sample,
    turn: int,
    message: Message,
    unused: str,
    marked: Marked,
) -> Message:
    """Return an assistant's message with a mark in the place of each of its texts, and add these to
    `marked`.

    White space around a text stays, so that a template strips the mark of what it strips the text
    of. Raises DataError.
    """

    def mark_of(text: str) -> str:
        mark = f"\ue001{unused}{len(marked)}\ue001"
        marked.append((turn, mark, text.strip()))
        return text.replace(text.strip(), mark, 1)

    message = copy.deepcopy(message) if message.get("tool_calls") else dict(message)
    content, thought = message["content"], message.get("reasoning_content")
    if thought and thought.strip():
        message["reasoning_content"] = mark_of(thought)
    elif THINK_TAGS[1] in content:
        thought, _, content = content.partition(THINK_TAGS[1])
        before, tag, thought = thought.rpartition(THINK_TAGS[0])
        # in the order in which they are rendered
        if thought.strip():
            thought = mark_of(thought)
        answer = mark_of(content) if content.strip() else content
        message["content"] = before + tag + thought + THINK_TAGS[1] + answer
        content = ""
    if content.strip():
        message["content"] = mark_of(content)
    elif message.get("tool_calls"):
        call = message["tool_calls"][0]
        function = call.get("function", call)
        # An answer of tool calls alone has no text; the first text that the template writes is a
        # name.
        function["name"] = mark_of(str(function.get("name", "")))
    if not marked or marked[-1][0] != turn:
        raise DataError(f"sample {sample.id}: turn {turn + 1} is an empty answer")
    return message


# Texts before which a piece may be encoded; a tokenizer may join some of them to the piece.
ANCHORS = ("a", "\n", ".", "0", "é")


def cut_at_borders(
    tokenizer: Any,
    text: str,
    ids: list[int],
    offsets: Offsets,
    borders: list[int],
) -> None:
    """Replace, in place, a text's tokens by those of its pieces between the borders.

    So the text before a border has the tokens that it has as a prompt, whatever follows: none
    crosses the border, and none is another because of the text behind (GPT-2's pattern takes two
    line breaks at a text's end as one token, and before a word as two). Where a piece cannot be
    encoded by itself nothing is changed.
    """
    added = tokenizer.added_tokens_decoder
    previous_border = 0
    for border in sorted(set(borders)):
        split_token(tokenizer, text, ids, offsets, border)
        end = bisect_left(offsets, (border, 0))
        begin = end
        # An added token is encoded by itself, so that the tokens behind it do not depend on the
        # text before it.
        while begin and offsets[begin - 1][0] >= previous_border:
            begin -= 1
            if ids[begin] in added:
                break
        previous_border = border
        if begin == end or offsets[end - 1][1] > border:
            continue
        start = offsets[begin][0]
        piece = text[start:border]
        encoded: tuple[list[int], Offsets] | None
        if begin == 0 or ids[begin] in added:
            encoded = encode(tokenizer, piece)
        else:
            encoded = inner_tokens(tokenizer, piece)
        if encoded is not None and encoded[0] != ids[begin:end]:
            ids[begin:end] = encoded[0]
            offsets[begin:end] = shifted(encoded[1], start)


def shifted(offsets: Offsets, distance: int) -> Offsets:
    """Return offsets moved by a number of characters."""
    return [(start + distance, end + distance) for start, end in offsets]


def split_token(
    tokenizer: Any,
    text: str,
    ids: list[int],
    offsets: Offsets,
    border: int,
) -> None:
    """Replace, in place, a token across character `border` of the text by the tokens of its two
    sides.

    Where the sides cannot be encoded by themselves nothing is changed.
    """
    # the first token that begins at the border or behind it
    last = bisect_left(offsets, (border, 0))
    first = last - 1
    if first < 0 or offsets[first][1] <= border:
        return
    start, end = offsets[first]
    # Tokens of one character's bytes overlap: all that do belong together.
    while first and offsets[first - 1][1] > start:
        first -= 1
        start = offsets[first][0]
    while last < len(ids) and offsets[last][0] < end:
        end = max(end, offsets[last][1])
        last += 1
    before = inner_tokens(tokenizer, text[start:border])
    after = inner_tokens(tokenizer, text[border:end])
    if before is None or after is None:
        return
    ids[first:last] = before[0] + after[0]
    offsets[first:last] = shifted(before[1], start) + shifted(after[1], border)


def inner_tokens(tokenizer: Any, piece: str, **options: Any) -> tuple[list[int], Offsets] | None:
    """Return a piece's tokens as they are inside a text, without the space that some tokenizers put
    at a text's start; None where the piece cannot be encoded by itself.

    Args:
        options: the tokenizer's.
    """
    for anchor in ANCHORS:
        length = len(anchor)
        ids, offsets = encode(tokenizer, anchor + piece, **options)
        count = sum(start < length for start, _ in offsets)
        piece_offsets = offsets[count:]
        if not piece_offsets or any(end > length for _, end in offsets[:count]):
            continue
        start, end = piece_offsets[0][0], piece_offsets[-1][1]
        if (start, end) == (length, length + len(piece)):
            return ids[count:], shifted(piece_offsets, -length)
    return None
