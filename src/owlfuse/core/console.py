"""rich's console for tables with texts of models and data."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from owlfuse.core.terminal import visible


class PlainConsole(Console):
    """A console on which texts are texts: square brackets and `:names:` are no markup, and
    control characters are shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See `rich.console.Console`."""
        for segment in super().render(renderable, options):
            # Control segments are rich's own, and move the cursor.
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def count(parameters: int) -> str:
    """Return a count of parameters in words: 12345678 as 12.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit}"
    return f"{parameters:,}"


def show(table: Table) -> None:
    """Print a table, in a file without the width of a terminal."""
    # For a file rich takes 80 columns, and would fold the cells.
    PlainConsole(width=None if sys.stdout.isatty() else 200).print(table)
