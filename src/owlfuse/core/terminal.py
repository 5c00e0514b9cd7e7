"""Makes text from models, data and files safe to print on a terminal."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
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


# Colors, with which transformers marks its tables.
COLORS = re.compile(r"\x1b\[[0-9;]*m")
FORMAT_LINE = logging.Handler.format


def format_visible(handler: logging.Handler, record: logging.LogRecord) -> str:
    """Return the line of a log without control characters, whatever a sample or a file is
    called."""
    return visible(COLORS.sub("", FORMAT_LINE(handler, record)))


def guard_terminal() -> None:
    """Make logged lines, warnings and tracebacks of this process visible text.

    The command line calls it once.
    """
    # Of the class: libraries bring handlers of their own when they are imported, which is later.
    logging.Handler.format = format_visible  # type: ignore[method-assign, assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter would end the command otherwise.
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout = OutputThatMayClose(sys.stdout)
    warnings.formatwarning = format_warning
    sys.excepthook = print_exception


class OutputThatMayClose:
    """A standard output whose reader may go, as `head` and a `tee` that Ctrl-C ends do: what is
    written then goes nowhere, and the command goes on."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.leave()
            return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase`."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.leave()

    def leave(self) -> None:
        """Let output go nowhere from now on, that of libraries too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


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
