"""The conversation as HTML.

All that visitors and models say goes through `html.escape`: it is text, whatever is in it.
"""

from __future__ import annotations

from html import escape

from owlfuse.serving.demo.talkers import Talker
from owlfuse.serving.demo.visitors import ANSWERING, DONE, WAITING, Answer, Turn, Visitor

WELCOME = "Show a picture or several, and ask about them."
WELCOME_MANY = (
    "Show a picture or several, and ask about them; every model answers the same question, "
    "one after another."
)


def heads(talkers: list[Talker]) -> str:
    """Each model's name and what it is made of."""
    cards = [
        f"<section class='model' aria-label='model {escape(one.name)}'><h2>{escape(one.name)}</h2>"
        + "".join(f"<p>{escape(fact)}</p>" for fact in one.facts)
        + "</section>"
        for one in talkers
    ]
    return grid(cards)


def grid(cells: list[str]) -> str:
    """Cells side by side, below each other on a narrow screen."""
    return f"<div class='side' style='--models: {len(cells)}'>{''.join(cells)}</div>"


def history(visitor: Visitor) -> str:
    """All that is over, and the question that is being answered."""
    if not visitor.turns:
        return f"<p class='welcome'>{WELCOME if len(visitor.talkers) == 1 else WELCOME_MANY}</p>"
    parts = [asked(turn) + (answers(visitor, turn) if turn.done else "") for turn in visitor.turns]
    return f"<div role='log' aria-label='Conversation'>{''.join(parts)}</div>"


def current(visitor: Visitor) -> str:
    """The answers that are being made."""
    return answers(visitor, visitor.pending) if visitor.pending else ""


def asked(turn: Turn) -> str:
    """A question with its pictures."""
    pictures = "".join(
        f"<img src='{uri}' alt='picture {number} of {len(turn.shown)} shown with this question'>"
        for number, uri in enumerate(turn.shown, start=1)
    )
    said = f"<p><span class='who'>You: </span>{escape(turn.question)}</p>"
    return f"<div class='asked'><div class='pictures'>{pictures}</div>{said}</div>"


def answers(visitor: Visitor, turn: Turn) -> str:
    """The answers to one question, side by side."""
    return grid([answer_cell(one, talker) for one, talker in zip(turn.answers, visitor.talkers)])


def answer_cell(answer: Answer, talker: Talker) -> str:
    """One model's answer, its time and speed, and where it looked."""
    text = escape(answer.text)
    if answer.state == WAITING:
        text = "<span class='quiet'>waiting for its turn …</span>"
    elif answer.state == ANSWERING:
        text += "<span class='caret' aria-hidden='true'></span>"
    elif not text:
        text = "<span class='quiet'>(no text)</span>"
    busy = "false" if answer.state == DONE else "true"
    return (
        f"<div class='answer' aria-busy='{busy}'><h3>{escape(talker.name)}</h3><p "
        f"class='text'>{text}</p>"
        f"<p class='note'>{escape(answer.note)}</p>{looks(answer, talker)}</div>"
    )


def looks(answer: Answer, talker: Talker) -> str:
    """The pictures with where the answer looked; of several, with the share of each."""
    if not answer.looks:
        return ""
    figures = []
    for number, look in enumerate(answer.looks, start=1):
        share = f"picture {number}: {look.share:.0%}" if len(answer.looks) > 1 else ""
        image = (
            f"<img src='{look.uri}' alt='where {escape(talker.name)} looked in picture "
            f"{number}, lighter for more'>"
        )
        figures.append(f"<figure>{image}<figcaption>{share}</figcaption></figure>")
    return (
        "<p class='note'>Where it looked, lighter for more:</p><div "
        f"class='pictures'>{''.join(figures)}</div>"
    )


def notice(sentence: str) -> str:
    """Why a question was not taken."""
    return f"<p role='alert' class='refused'>{escape(sentence)}</p>" if sentence else ""
