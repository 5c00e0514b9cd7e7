"""Makes text from models, data and files safe to print on a terminal."""

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

# Marks that change the order in which characters are shown, so that a line may read as another.
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """Return the text with control characters written as escapes (`\\x1b`), except for newlines and
    tabs.

    A terminal obeys control characters: it sets its title, moves the cursor, or answers with keys
    that a shell then reads. Surrogates, which no encoding can send, are written as escapes too.
    """
    # Nearly all texts, and the check is in C.
    if text.isprintable():
        return text
    return "".join(c if is_harmless(c) else escaped(c) for c in text)


def is_harmless(character: str) -> bool:
    """Whether a terminal only draws the character, or it is a newline or a tab."""
    if character in "\n\t":
        return True
    if character in BIDI:
        return False
    # Cc: control characters; Cs: surrogates; Zl, Zp: the separators of lines and paragraphs.
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def escaped(character: str) -> str:
    """Return the character as Python would write it in a string."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def cell(text: str) -> str:
    """Return text for a table of rich, without effect of control characters and of the square
    brackets of rich's markup."""
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
    """Make logged lines, warnings and tracebacks of this process visible text.

    The command line calls it once.
    """
    handlers: list[logging.Handler] = [*logging.getLogger().handlers]
    # It prints for loggers that have no handler.
    if logging.lastResort:
        handlers.append(logging.lastResort)
    # These may have handlers of their own.
    for name in ("lightning", "lightning.pytorch", "transformers", "owlfuse"):
        handlers += logging.getLogger(name).handlers
    for handler in handlers:
        if not isinstance(handler.formatter, VisibleFormatter):
            handler.setFormatter(VisibleFormatter(handler.formatter or logging.Formatter()))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter would end the command otherwise.
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
    """Return a warning as Python writes it, visible."""
    return visible(f"{filename}:{lineno}: {category.__name__}: {message}\n")


def print_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception as Python does, visible."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))


LAYOUT: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
