"""Data frames of texts as tables: on a terminal, and in Markdown."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.table import Table


def terminal_table(frame: pd.DataFrame, title: str, text_columns: int = 1, **options: Any) -> Table:
    """Return a table of rich: the first `text_columns` columns hold texts, the others numbers.

    Args:
        options: keyword arguments of `rich.table.Table`.
    """
    table = Table(title=title, title_justify="left", caption_justify="left", **options)
    for index, column in enumerate(frame.columns):
        # A text that is too long goes on in the next line: nothing is cut.
        justify: Any = "left" if index < text_columns else "right"
        table.add_column(str(column), justify=justify, overflow="fold")
    # A record may lack a column.
    for texts in frame.fillna("").itertuples(index=False):
        table.add_row(*texts)
    return table


def markdown_table(frame: pd.DataFrame, number_alignment: bool = False) -> str:
    """Return the lines of a Markdown table, in which the bars of texts are escaped.

    Args:
        number_alignment: whether all columns but the first are aligned to the right.
    """
    rule = "---:" if number_alignment else "---"
    rules = ["---", *[rule] * (len(frame.columns) - 1)]
    lines = [list(frame.columns), rules, *frame.fillna("").to_numpy().tolist()]
    # DataFrame.to_markdown would need tabulate, a package that nothing else here needs.
    escaped = [[str(text).replace("|", "\\|") for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
