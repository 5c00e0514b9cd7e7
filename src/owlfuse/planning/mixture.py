"""`owlfuse mixture`: what a run would draw, before there is a model: sources, shares, passes,
skips, lengths."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.table import Table

from owlfuse.artifacts.runs import write_mixture
from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import compose, place
from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.progress import track
from owlfuse.core.terminal import visible
from owlfuse.data.datamodule import ChatData
from owlfuse.data.mixture.lengths import Lengths
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.model.multimodal import on_meta

BLOCK = 2**18
"""Positions that are looked at at a time."""


class NoPictures:
    """Stands for the preprocessing where the model's parts are not at hand."""

    size = (1, 1)


def mixture_command(words: list[str]) -> dict[str, Any]:
    """Composes `words`, prints the tables, and writes mixture.json into
    `runs/mixture/<experiment>/` or `out=`'s folder.

    Args:
        words: overrides, and `steps=N` (else trainer.max_steps) and `out=DIR`.

    Raises:
        ConfigError: what is wrong with the words. DataError: what is wrong with the data.
    """
    own = {
        key: value
        for key, _, value in (word.partition("=") for word in words)
        if key in ("steps", "out")
    }
    config = compose([word for word in words if word.partition("=")[0] not in own])
    steps = own.get("steps", str(config.trainer.max_steps))
    if not steps.isdigit() or not int(steps):
        raise ConfigError(f"command line: steps={steps}: expected a number of steps from 1 on")
    try:
        data = build(config.data)
        notes = bind(data, config)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(place(config, str(error))) from error
    lengths = data.lengths()
    report = survey(data, lengths, int(steps))
    report["notes"] = notes + report["notes"]
    folder = Path(own.get("out") or Path(config.runs) / "mixture" / config.experiment).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_mixture(folder, report)
    print_survey(report)
    print(visible(f"mixture.json is in {folder}"))
    return report


def bind(data: ChatData, config: DictConfig) -> list[str]:
    """Tells the data how many positions an image takes, which the parts say without weights; a
    note where they cannot."""
    try:
        plan, _ = on_meta(to_dict(config.model), vocab_size=1024)
    except OSError as error:  # a part's configuration is not here
        data.bind(NoPictures(), 1)  # type: ignore[arg-type]  # never called: nothing is opened
        return [
            (
                "an image counts as one position, for the model's parts are not at hand: "
                f"{str(error).splitlines()[0]}"
            )
        ]
    data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
    return []


def survey(data: ChatData, lengths: dict[str, Lengths], steps: int) -> dict[str, Any]:
    """Return `ChatData.report` after some steps, with the lengths of the samples and what is left
    out of them. Only whole global batches count, as in a run."""
    mixture, size = data.mixture, data.global_batch_size
    asked = steps * size
    available = mixture.available(asked)
    whole_steps = available // size
    length_counts, wrong = lengths_and_errors(mixture, lengths, whole_steps * size)
    report = data.report(whole_steps, left_out(data, wrong, lengths))
    # These two are of batches, and there are none.
    del report["validation"], report["padding"]
    notes = [] if available == asked else [end_note(report, available, asked)]
    notes += duplicate_notes(report)
    for name in mixture.names:
        notes += [
            f"source {name}: {text} ({samples:,} samples)"
            for text, samples in lengths[name].notes.items()
        ]
    for name, first in first_errors(data, wrong).items():
        notes.append(
            f"source {name} has on_error=error and a wrong sample at step {first // size}, which "
            "ends the run"
        )
    for name, row in report["sources"].items():
        counted = lengths[name]
        # Notes of draws are none without draws; those of all samples are in the report's notes.
        del row["notes"]
        row["wrong_samples"] = len(counted.wrong)
        row["length"] = None
        right = counted.tokens[counted.tokens > 0]
        if len(right):
            row["length"] = {"mean": float(right.mean()), "longest": int(right.max())}
    report.update(histogram=histogram(length_counts), notes=notes)
    return report


def end_note(report: dict[str, Any], available: int, asked: int) -> str:
    """Say where a schedule ends, and what it leaves."""
    rest = available % report["global_batch_size"]
    left = ", ".join(
        f"{name} {row['left_of_last_pass']:,}" for name, row in report["sources"].items()
    )
    return (
        f"the schedule ends (at_end) after {available:,} samples of {asked:,}"
        + (f", the last {rest:,} of which make no whole global batch" if rest else "")
        + f"; never drawn of each source's last pass: {left}"
    )


def duplicate_notes(report: dict[str, Any]) -> list[str]:
    """Sources in which several records have one id."""
    notes = []
    for name, row in report["sources"].items():
        if first := row["duplicate_ids"]["first"]:
            one, other = first["samples"]
            count, looked_at = row["duplicate_ids"]["count"], row["duplicate_ids"]["looked_at"]
            notes.append(
                f"source {name}: {count:,} records bear the id of another, of {looked_at:,} "
                "samples that were compared; "
                f"the first is {first['id'][:80]}, of samples {one + 1} and {other + 1} as the "
                "file counts them"
            )
    return notes


def lengths_and_errors(
    mixture: Mixture, lengths: dict[str, Lengths], positions: int
) -> tuple[np.ndarray, dict[str, list[tuple[int, int]]]]:
    """Return how many of the first positions' samples have each length, and the positions and
    indices of the wrong ones by source."""
    longest = max(int(counted.tokens.max()) for counted in lengths.values())
    length_counts = np.zeros(longest + 1, dtype=np.int64)
    wrong: dict[str, list[tuple[int, int]]] = {}
    wrong_indices = {
        name: np.array(sorted(lengths[name].wrong), dtype=np.int64) for name in mixture.names
    }
    blocks = range(0, positions, BLOCK)
    for start in track(blocks, "drawing", len(blocks)):
        sources, indices = mixture.positions(start, min(start + BLOCK, positions))
        for number, name in enumerate(mixture.names):
            offsets = np.flatnonzero(sources == number)
            samples = indices[offsets]
            tokens = lengths[name].tokens[samples]
            length_counts += np.bincount(tokens, minlength=longest + 1)
            if len(wrong_indices[name]):
                hits = np.isin(samples, wrong_indices[name])
                wrong.setdefault(name, []).extend(
                    zip((offsets[hits] + start).tolist(), samples[hits].tolist(), strict=True)
                )
    # Wrong samples have no tokens.
    length_counts[0] = 0
    return length_counts, wrong


def left_out(
    data: ChatData, wrong: dict[str, list[tuple[int, int]]], lengths: dict[str, Lengths]
) -> list[tuple[str, str, str]]:
    """(source, sample, reason) of each draw that is skipped."""
    return [
        (name, f"{name}:{index}", lengths[name].wrong[index])
        for name, found in wrong.items()
        if data.sources[name].on_error == "skip"
        for _, index in found
    ]


def first_errors(data: ChatData, wrong: dict[str, list[tuple[int, int]]]) -> dict[str, int]:
    """The first position at which a source stops the run."""
    return {
        name: found[0][0]
        for name, found in wrong.items()
        if found and data.sources[name].on_error != "skip"
    }


def histogram(counts: np.ndarray) -> list[dict[str, int]]:
    """Samples by length in about a dozen bins of equal width, from the count of each length."""
    longest = int(np.flatnonzero(counts).max(initial=0))
    width = next(size for k in range(40) for size in (2**k * 4, 2**k * 6) if size * 14 > longest)
    edges = range(0, longest + 1, width)
    return [
        {"from": edge, "to": edge + width - 1, "samples": int(counts[edge : edge + width].sum())}
        for edge in edges
    ]


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
    table = table_of(
        "sources", "source", "samples", "wrong", "mean length", "longest", "at end", "sha256"
    )
    for name, row in report["sources"].items():
        length = row["length"] or {"mean": 0, "longest": 0}
        sizes = (
            f"{row['samples']:,}",
            f"{row['wrong_samples']:,}",
            f"{length['mean']:.1f}",
            f"{length['longest']:,}",
        )
        table.add_row(name, *sizes, row["at_end"], row["sha256"][:12])
    return table


def drawn_table(report: dict[str, Any]) -> Table:
    """What each source gives."""
    by = report["weights_by"]
    title = (
        f"{report['samples']:,} samples, {report['steps']:,} steps of "
        f"{report['global_batch_size']}, weights by {by}"
    )
    asked = f"asked, {by}"
    table = table_of(
        title, "source", asked, "samples", "tokens*", "drawn", "tokens*", "passes", "skipped"
    )
    for name, row in report["sources"].items():
        shares = (percent(row[key]) for key in ("asked_share", "drawn_share", "supervised_share"))
        counts = (
            f"{row['drawn']:,}",
            f"{row['supervised_tokens']:,}",
            f"{row['passes']:.2f}",
            f"{row['skipped']:,}",
        )
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
    table = Table(
        title=f"{len(skipped):,} skipped of {len(counted):,} samples", title_justify="left"
    )
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
