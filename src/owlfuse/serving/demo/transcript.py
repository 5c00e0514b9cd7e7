"""The conversation as HTML.

All that visitors and models say is escaped by jinja2: it is text, whatever is in it.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from owlfuse.serving.demo.models import DemoModel
from owlfuse.serving.demo.visitors import ANSWERING, DONE, WAITING, Visitor

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals.update(WAITING=WAITING, ANSWERING=ANSWERING, DONE=DONE)
# Macros of a template without variables are functions of its module.
MACROS = ENVIRONMENT.get_template("transcript.html.jinja").module


def heads(models: list[DemoModel]) -> str:
    """Return each model's name and what it is made of."""
    return str(MACROS.heads(models))  # type: ignore[attr-defined]


def history(visitor: Visitor) -> str:
    """Return all that is over, and the question that is being answered."""
    return str(MACROS.history(visitor))  # type: ignore[attr-defined]


def current(visitor: Visitor) -> str:
    """Return the answers that are being made."""
    if visitor.pending is None:
        return ""
    return str(MACROS.answers(visitor, visitor.pending))  # type: ignore[attr-defined]


def notice(sentence: str) -> str:
    """Return why a question was not taken."""
    return str(MACROS.notice(sentence))  # type: ignore[attr-defined]
