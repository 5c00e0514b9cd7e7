"""The tables of `owlfuse mixture`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.table import Table

from owlfuse.console import PlainConsole as Console

REASONS = 12
"""Lines of the table of skips; all of them are in mixture.json."""


def print_survey(report: dict[str, Any]) -> None:
    """Sources, skips with their reasons, and the lengths' histogram."""
    console = Console()
    console.print(sources_table(report))
    console.print(drawn_table(report))
    if report["skipped"]:
        console.print(skips_table(report["skipped"]))
    console.print(histogram_table(report["histogram"]))
    for note in report["notes"]:
        console.print(f"note: {note}")


def sources_table(report: dict[str, Any]) -> Table:
    """What each source is."""
    table = table_of("sources", "source", "samples", "wrong", "mean length", "longest", "at end", "sha256")
    for name, row in report["sources"].items():
        length = row["length"] or {"mean": 0, "longest": 0}
        sizes = f"{row['samples']:,}", f"{row['wrong_samples']:,}", f"{length['mean']:.1f}", f"{length['longest']:,}"
        table.add_row(name, *sizes, row["at_end"], row["sha256"][:12])
    return table


def drawn_table(report: dict[str, Any]) -> Table:
    """What each source gives."""
    by = report["weights_by"]
    title = f"{report['samples']:,} samples, {report['steps']:,} steps of {report['global_batch_size']}, weights by {by}"
    asked = f"asked, {by}"
    table = table_of(title, "source", asked, "samples", "tokens*", "drawn", "tokens*", "passes", "skipped")
    for name, row in report["sources"].items():
        shares = (percent(row[key]) for key in ("asked_share", "drawn_share", "supervised_share"))
        counts = f"{row['drawn']:,}", f"{row['supervised_tokens']:,}", f"{row['passes']:.2f}", f"{row['skipped']:,}"
        table.add_row(name, *shares, *counts)
    table.caption, table.caption_justify = "* supervised", "left"
    return table


def table_of(title: str, *head: str) -> Table:
    """An empty table, numbers to the right."""
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def skips_table(skipped: list[dict[str, str]]) -> Table:
    """The reasons, the most frequent first."""
    counted = Counter((skip["source"], skip["reason"]) for skip in skipped)
    table = Table(title=f"{len(skipped):,} skipped of {len(counted):,} samples", title_justify="left")
    for name in ("source", "times", "reason"):
        table.add_column(name)
    for (source, reason), times in counted.most_common(REASONS):
        table.add_row(source, str(times), reason)
    if len(counted) > REASONS:
        table.add_row("", "", f"and {len(counted) - REASONS} more, in mixture.json")
    return table


def histogram_table(bins: list[dict[str, int]]) -> Table:
    """A bar for each bin of lengths."""
    table = Table(title="lengths in tokens", title_justify="left")
    for name, side in (("tokens", "right"), ("samples", "right"), ("", "left")):
        table.add_column(name, justify="left" if side == "left" else "right")
    most = max((row["samples"] for row in bins), default=0) or 1
    for row in bins:
        bar = "█" * round(40 * row["samples"] / most) or ("▏" if row["samples"] else "")
        table.add_row(f"{row['from']:,}-{row['to']:,}", f"{row['samples']:,}", bar)
    return table


def percent(share: float | None) -> str:
    """0.5 -> 50.00 %."""
    return "" if share is None else f"{100 * share:.2f} %"
