"""Which characters of a rendered chat are supervised: each answer as rendered, and its end mark."""

from __future__ import annotations

from collections.abc import Callable

from owlfuse.types import DataError, Sample

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]
"""Messages, and whether the generation prompt follows -> text."""

STRIPS = (str, str.strip, str.rstrip, str.lstrip)
"""What templates do to an answer before they write it."""


def supervised_spans(sample: Sample, messages: list[Message], text: str, render: Render) -> list[tuple[int, int]]:
    """Start and end of each assistant turn in `text`, the whole chat rendered.

    The chat is rendered again with a mark in the place of each answer. What stands around the marks is the template's and the
    user's, and must give `text` with the answers put back, to the character: so nothing that a text says is mistaken for the
    template's own. A span begins where the generation prompt ends, so a space that the model has to write is supervised; it
    ends after what the template writes at the end of the last answer, without white space behind it.

    Raises:
        DataError: no answer, an empty one, or a template that writes an answer otherwise alone than in the chat.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"sample {sample.id} has no assistant turn, so there is nothing to learn from it")
    for index in answers:
        if not messages[index]["content"].strip():
            raise DataError(f"sample {sample.id}: turn {index} is an empty answer")
    around = surroundings(sample, messages, answers, text, render)
    starts, ends = places(sample, around, [messages[index]["content"] for index in answers], text)
    last = messages[: answers[-1] + 1]
    closing = around[-1] if len(last) == len(messages) else surroundings(sample, last, answers, text, render)[-1]
    lead = written_first(sample, last[:-1], render, text, starts[-1])
    end_mark = closing.rstrip()
    spans = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not text.startswith(end_mark, end):
            raise DataError(f"sample {sample.id}: the chat template ends turn {answers[number]} otherwise than the last answer")
        before = len(lead) if around[number].endswith(lead) else 0
        spans.append((start - before, end + len(end_mark)))
    return spans


def surroundings(sample: Sample, messages: list[Message], answers: list[int], text: str, render: Render) -> list[str]:
    """What is rendered before the first answer, between two, and after the last."""
    mark = "\ue000"
    while mark in text:
        mark += "\ue000"
    marks = {index: f"\ue001{mark}{index}\ue001" for index in answers}
    rest = render([{**message, "content": marks.get(i, message["content"])} for i, message in enumerate(messages)], False)
    pieces = []
    for index in answers:
        piece, found, rest = rest.partition(marks[index])
        if not found or marks[index] in rest:
            raise DataError(f"sample {sample.id}: the chat template writes turn {index} not once, so it cannot be supervised")
        pieces.append(piece)
    return [*pieces, rest]


def places(sample: Sample, around: list[str], contents: list[str], text: str) -> tuple[list[int], list[int]]:
    """Where each answer begins and ends in the text."""
    for strip in STRIPS:
        written = [strip(content) for content in contents]
        if around[0] + "".join(a + piece for a, piece in zip(written, around[1:], strict=True)) == text:
            starts, ends, place = [], [], 0
            for piece, answer in zip(around, written):
                starts.append(place + len(piece))
                place = starts[-1] + len(answer)
                ends.append(place)
            return starts, ends
    raise DataError(f"sample {sample.id}: the chat template changes an answer otherwise than by stripping it of white space")


def written_first(sample: Sample, asked: list[Message], render: Render, text: str, start: int) -> str:
    """What the model has to write between the generation prompt and its answer, a space for instance. Of a template without a
    generation prompt no more than white space, since its header is no part of the answer."""
    prompt = render(asked, True)
    if not text.startswith(prompt) or len(prompt) > start:
        raise DataError(
            f"sample {sample.id}: the chat template renders what comes before turn {len(asked)} otherwise alone than in the "
            "whole chat, so that its answer cannot be told from the prompt"
        )
    lead = text[len(prompt) : start]
    if lead.strip() and prompt == render(asked, False):
        return lead[len(lead.rstrip()) :]
    return lead
