"""Sphinx builds these pages:

`make docs`. Nothing is fetched, neither by the build nor by a page that is opened.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import configuration_keys  # docs/configuration_keys.py

import owlfuse
from owlfuse.__main__ import make_parser

project = "owlfuse"
release = version = owlfuse.__version__
author = copyright = "the owlfuse authors"
html_title = f"owlfuse {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples/**"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # an included README begins at a level of its own

nitpicky = True  # a reference that leads nowhere is an error
nitpick_ignore_regex = [
    # other libraries' names have no page here, and no network to look them up
    (r"py:.*", r"(?!owlfuse\.).*"),
    # type variables, and the composition that Hydra's wrapper keeps for itself
    (r"py:.*", r"owlfuse\..*\.(T|Value|BatchT|PreparedT|ResultT|Composition)"),
]

html_theme = "furo"  # system fonts
html_show_sourcelink = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # torch's own words on what our classes override
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
napoleon_use_ivar = True  # a documented attribute is one entry, not two
napoleon_use_rtype = False


set_aside: dict[str, list[str]] = {}


def to_restructured(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in single backticks; what else would mean something
    to Sphinx is escaped."""
    text = "\n".join(lines)
    pieces = re.split(r"(`[^`]+`)", text)
    pieces = [
        f"`{p}`" if p.startswith("`") else re.sub(r"([*|\\])|(?<=\w)_(?!\w)", r"\\\g<0>", p)
        for p in pieces
    ]
    lines[:] = "".join(pieces).split("\n")
    # napoleon takes words before a colon in the first line as a type
    if what in ("attribute", "data", "property"):
        set_aside[name] = lines[:]
        lines.clear()


def take_back(app, what, name, obj, options, lines: list[str]) -> None:
    """What was set aside for after napoleon."""
    lines[:] = set_aside.pop(name, lines)


def fill_in(app, docname: str, source: list[str]) -> None:
    """What is made from the code stands where a page has its mark."""
    if docname == "configuration":
        source[0] = source[0].replace(
            (
                "The tables stand here once `make docs` has made them; `python "
                "docs/configuration_keys.py` prints them."
            ),
            configuration_keys.page(),
        )
    if docname == "commands":
        source[0] = source[0].replace("`make docs` puts the pages of help here.", help_pages())


def help_pages() -> str:
    """Each command with what its `--help` prints."""
    os.environ["COLUMNS"] = "110"
    parser = make_parser()
    found = []
    for name, command in subparsers(parser).items():
        below = "\n".join(each.format_help() for each in subparsers(command).values())
        found.append(f"## owlfuse {name}\n\n```text\n{command.format_help()}{below}```\n")
    return "\n".join(found)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands by name."""
    actions = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return {name: command for action in actions for name, command in action.choices.items()}


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", to_restructured, priority=1)  # before napoleon
    app.connect("autodoc-process-docstring", take_back, priority=999)
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True}
