"""What models, data and files say reaches the terminal as text."""

import io
import logging
import os
import sys
import unicodedata
import warnings

import pytest
from rich.table import Table
from rich.text import Text

from owlfuse.core.console import PlainConsole, show
from owlfuse.core.errors import failed
from owlfuse.core.terminal import (
    OutputThatMayClose,
    cell,
    format_visible,
    format_warning,
    print_exception,
    visible,
)
from owlfuse.serving import chat

ATTACKS = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b2J",
    "a\rb",
    "\x08\x08",
    "\u202egnp.exe",
    "\u2066a\u2069",
    "\x00",
    "\udc80",
    "\u2028",
]


def is_shown(text):
    """Nothing of the text moves a cursor, sets a title or turns letters round."""
    return not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl") or c in "\u202e\u2066\u2069"
        for c in text
        if c not in "\n\t"
    )


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_control_characters_are_shown_by_everything_that_prints(attack, capsys):
    assert is_shown(visible(attack))
    chat.to_terminal(attack)
    failed(f"sample {attack}", 1)
    print(format_warning(attack, UserWarning, "file.py", 1))
    print_exception(ValueError, ValueError(attack), None)
    record = logging.LogRecord(
        "owlfuse", logging.WARNING, "file.py", 1, "skipped %s", (attack,), None
    )
    print(format_visible(logging.StreamHandler(), record))
    table = Table(attack, title=attack)
    table.add_row(attack)
    PlainConsole().print(table)
    PlainConsole().print(attack)
    printed = capsys.readouterr()
    assert is_shown(printed.out + printed.err)
    assert attack not in printed.out + printed.err


@pytest.mark.parametrize("text", ["", "a\n\tb", "größer 日本語 שלום", "👩‍👧 e\u0301", "x" * 10_000])
def test_other_text_stays_as_it_is(text):
    assert visible(text) == text


def test_brackets_of_a_table_are_no_markup():
    file = io.StringIO()
    table = Table("name")
    table.add_row("[/red] [link=http://x]a[/link] :smile:")
    PlainConsole(file=file, width=80).print(table)
    assert "[/red] [link=http://x]a[/link] :smile:" in file.getvalue()
    assert Text.from_markup(cell("[/red]")).plain == "[/red]"


def test_a_list_among_the_overrides_of_a_table_is_no_markup(capsys):
    table = Table("overrides")
    table.add_row("trainer.callbacks=[red,b]")
    show(table)
    assert "trainer.callbacks=[red,b]" in capsys.readouterr().out


def test_the_command_line_guards_warnings_and_errors(monkeypatch):
    from owlfuse.core import terminal

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr("sys.stdout", sys.stdout)
    monkeypatch.setattr(logging.Handler, "format", logging.Handler.format)
    terminal.guard_terminal()
    assert warnings.formatwarning is format_warning
    # That of a library, which is made later, too.
    for handler in (logging.lastResort, logging.StreamHandler()):
        line = handler.format(logging.LogRecord("a", 30, "f", 1, "\x1b[31mred\x1b[2J", (), None))
        assert line == "red\\x1b[2J"


def test_an_output_whose_reader_has_gone_ends_no_command():
    reader, writer = os.pipe()
    stream = OutputThatMayClose(open(writer, "w", buffering=1))  # noqa: SIM115
    os.close(reader)
    for _ in range(3):
        print("a line", file=stream)
    stream.flush()
    os.write(stream.fileno(), b"of a library")
    stream.close()
