"""Text from models, data and files as a terminal may be given it."""

from __future__ import annotations

import argparse
import io
import logging
import sys
import traceback
import unicodedata
import warnings
from types import TracebackType
from typing import Any

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the order in which characters are shown, so that a line may read otherwise
than it is."""
LINE_BREAKS = frozenset("\u2028\u2029")


def visible(text: str) -> str:
    """The text with control characters written as escapes (`\\x1b`), except for newlines and tabs.

    A terminal obeys control characters: it sets its title, moves the cursor, or answers with keys
    that a shell then reads. Surrogates, which no encoding can send, are written as escapes too.
    """
    if text.isprintable():
        return text
    return "".join(
        character if is_harmless(character) else escaped(character) for character in text
    )


def is_harmless(character: str) -> bool:
    """Whether a terminal only draws the character, or it is a newline or a tab."""
    if character in "\n\t":
        return True
    if character in BIDI or character in LINE_BREAKS:
        return False
    return unicodedata.category(character) not in ("Cc", "Cs")


def escaped(character: str) -> str:
    """The character as Python would write it in a string."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def cell(text: str) -> str:
    """Text for a table of rich: neither control characters nor the square brackets of rich's
    markup have an effect."""
    from rich.markup import escape

    return escape(visible(text))


class VisibleFormatter(logging.Formatter):
    """A formatter whose lines hold no control characters, whatever a sample or a file is called."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return visible(self.formatter.format(record))


def guard_terminal() -> None:
    """Makes logged lines, warnings and tracebacks of this process visible text.

    Called once, by the command line.
    """
    last_resort = logging.lastResort
    handlers = [*logging.getLogger().handlers, *([last_resort] if last_resort else [])]
    for name in ("lightning", "lightning.pytorch", "transformers", "owlfuse"):
        handlers += logging.getLogger(name).handlers
    for handler in handlers:
        if not isinstance(handler.formatter, VisibleFormatter):
            handler.setFormatter(VisibleFormatter(handler.formatter or logging.Formatter()))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that lacks a letter is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = format_warning
    sys.excepthook = print_exception


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """As Python's, visible."""
    return visible(f"{filename}:{lineno}: {category.__name__}: {message}\n")


def print_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """As Python's, visible."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))


LAYOUT: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
