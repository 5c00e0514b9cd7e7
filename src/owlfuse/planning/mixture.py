"""`owlfuse mixture`: what a run would draw, before there is a model: sources, shares, passes,
skips, lengths."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich.table import Table

from owlfuse.artifacts.runs import write_mixture
from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import compose, naming_part
from owlfuse.config.messages import split_settings
from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.errors import ConfigError, first_line
from owlfuse.core.progress import track
from owlfuse.core.terminal import visible
from owlfuse.data.datamodule import ChatData
from owlfuse.data.mixture.lengths import Lengths
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.model.multimodal import on_meta
from owlfuse.planning.frames import terminal_table

BLOCK = 2**18
"""Positions that are drawn at a time."""
MAX_REASONS = 12
"""Lines of the table of skips; all of them are in mixture.json."""
HISTOGRAM_BINS = 14
"""At most."""
BAR_WIDTH = 40
"""Characters of the longest bar."""
Draw = tuple[int, int]
"""A position of the mixture, and the index of the sample there in its source."""


class NoPictures:
    """Stands for the preprocessing where the model's parts are not at hand."""

    size = (1, 1)
    resize = "stretch"


def mixture_command(words: list[str]) -> dict[str, Any]:
    """Composes `words`, prints the tables, and writes mixture.json into
    `runs/mixture/<experiment>/` or `out=`'s folder.

    Args:
        words: overrides, and `steps=N` (else trainer.max_steps) and `out=DIR`.

    Raises:
        ConfigError: what is wrong with the words. DataError: what is wrong with the data.
    """
    settings, overrides = split_settings(words, ("steps", "out"))
    config = compose(overrides)
    steps = settings.get("steps", str(config.trainer.max_steps))
    # int() would take "-1", " 7" and "1_000" too.
    if not steps.isdecimal() or not int(steps):
        raise ConfigError(f"command line: steps={steps}: expected a number of steps from 1 on")
    with naming_part(config):
        data = build(config.data)
        notes = bind(data, config)
    report = mixture_report(data, data.lengths(), int(steps))
    report["notes"] = notes + report["notes"]
    default = Path(config.runs) / "mixture" / config.experiment
    folder = Path(settings.get("out") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_mixture(folder, report)
    print_report(report)
    print(visible(f"mixture.json is in {folder}"))
    return report


def bind(data: ChatData, config: DictConfig) -> list[str]:
    """Binds the data to how many positions an image takes, which the parts say without weights,
    and returns a note where they cannot."""
    try:
        # The vocabulary changes no count of positions.
        model, _ = on_meta(to_dict(config.model), vocab_size=1024)
    except OSError as error:  # a part's configuration is not here
        data.bind(NoPictures(), 1)  # type: ignore[arg-type]  # no picture becomes pixels
        return [
            "an image counts as one position, for the model's parts are not at hand: "
            + first_line(error)
        ]
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    return []


def mixture_report(data: ChatData, lengths: dict[str, Lengths], steps: int) -> dict[str, Any]:
    """Return `ChatData.report` after some steps, with the lengths of the samples and what is left
    out of them. Only full global batches count, as in a run."""
    mixture, batch_size = data.mixture, data.global_batch_size
    requested = steps * batch_size
    available = mixture.available(requested)
    full_steps = available // batch_size  # a run takes no incomplete batch
    length_counts, wrong_draws = count_lengths(mixture, lengths, full_steps * batch_size)
    report = data.report(full_steps, skipped_samples(data, wrong_draws, lengths))
    # These two are of batches, and there are none.
    del report["validation"], report["padding"]

    notes = [] if available == requested else [end_note(report, available, requested)]
    notes += duplicate_notes(report)
    for name in mixture.names:
        for text, samples in lengths[name].notes.items():
            notes.append(f"source {name}: {text} ({samples:,} samples)")
    for name, draws in wrong_draws.items():
        if note := ending_note(data, name, draws, lengths):
            notes.append(note)
    for name, row in report["sources"].items():
        # Notes of draws are none without draws; those of all samples are in the report's notes.
        del row["notes"]
        row["wrong_samples"] = len(lengths[name].wrong)
        row["length"] = None
        tokens = lengths[name].tokens
        tokens = tokens[tokens > 0]  # wrong samples have none
        if len(tokens):
            row["length"] = {"mean": float(tokens.mean()), "longest": int(tokens.max())}
    report.update(histogram=histogram(length_counts), notes=notes)
    return report


def end_note(report: dict[str, Any], available: int, requested: int) -> str:
    """Return where a schedule ends, and what it leaves."""
    incomplete = available % report["global_batch_size"]
    line = f"the schedule ends (at_end) after {available:,} samples of {requested:,}"
    if incomplete:
        line += f", the last {incomplete:,} of which make no whole global batch"
    undrawn = []
    for name, row in report["sources"].items():
        undrawn.append(f"{name} {row['left_of_last_pass']:,}")
    return f"{line}; never drawn of each source's last pass: {', '.join(undrawn)}"


def duplicate_notes(report: dict[str, Any]) -> list[str]:
    """Return a line for each source in which several records have one id."""
    notes = []
    for name, row in report["sources"].items():
        duplicates = row["duplicate_ids"]
        if first := duplicates["first"]:
            earlier, later = first["samples"]
            notes.append(
                f"source {name}: {duplicates['count']:,} records bear the id of another, of "
                f"{duplicates['looked_at']:,} samples that were compared; the first is "
                f"{first['id'][:80]}, of samples {earlier + 1} and {later + 1} as the file counts "
                "them"
            )
    return notes


def count_lengths(
    mixture: Mixture, lengths: dict[str, Lengths], positions: int
) -> tuple[np.ndarray, dict[str, list[Draw]]]:
    """Return how many of the first positions' samples have each length, and the draws of wrong
    ones by source."""
    # one length for all sources, so that their counts can be added up
    longest = max(int(source.tokens.max()) for source in lengths.values())
    length_counts = np.zeros(longest + 1, dtype=np.int64)
    wrong_indices = {}
    for name in mixture.names:
        wrong_indices[name] = np.array(sorted(lengths[name].wrong), dtype=np.int64)
    wrong_draws: dict[str, list[Draw]] = {}
    blocks = range(0, positions, BLOCK)
    # In blocks, for a bounded memory: a run may draw billions of positions.
    for start in track(blocks, "drawing", len(blocks)):
        sources, indices = mixture.positions(start, min(start + BLOCK, positions))
        for number, name in enumerate(mixture.names):
            offsets = np.flatnonzero(sources == number)
            samples = indices[offsets]
            tokens = lengths[name].tokens[samples]
            # Summed, not collected: a list of all lengths would grow with the run.
            length_counts += np.bincount(tokens, minlength=longest + 1)
            if len(wrong_indices[name]):
                is_wrong = np.isin(samples, wrong_indices[name])
                wrong_positions = (offsets[is_wrong] + start).tolist()
                wrong_samples = samples[is_wrong].tolist()
                draws = zip(wrong_positions, wrong_samples, strict=True)
                wrong_draws.setdefault(name, []).extend(draws)
    # Wrong samples have no tokens.
    length_counts[0] = 0
    return length_counts, wrong_draws


def skipped_samples(
    data: ChatData, wrong_draws: dict[str, list[Draw]], lengths: dict[str, Lengths]
) -> list[tuple[str, str, str]]:
    """Return (source, sample, reason) of each draw that is skipped."""
    skipped = []
    for name, draws in wrong_draws.items():
        for _, index in draws:
            if is_skipped(data, name, index, lengths):
                skipped.append((name, f"{name}:{index}", lengths[name].wrong[index]))
    return skipped


def is_skipped(data: ChatData, name: str, index: int, lengths: dict[str, Lengths]) -> bool:
    """Return whether training leaves a wrong sample out, and does not end at it."""
    return data.sources[name].on_error == "skip" or index in lengths[name].too_long


def ending_note(
    data: ChatData, name: str, draws: list[Draw], lengths: dict[str, Lengths]
) -> str | None:
    """Return where a source's wrong draws, in the order of their positions, end the run; None where
    they do not."""
    source = data.sources[name]
    skipped: set[int] = set()
    for position, index in draws:
        # A sample that is drawn again counts once, as in training.
        skipped.add(index)
        if not is_skipped(data, name, index, lengths):
            ending = "on_error=error and a wrong sample"
        elif len(skipped) > source.max_skips:
            ending = f"more wrong samples than its max_skips of {source.max_skips}"
        elif len(skipped) == len(source):
            ending = "no sample left"
        else:
            continue
        step = position // data.global_batch_size
        return f"source {name} has {ending} at step {step}, which ends the run"
    return None


def histogram(counts: np.ndarray) -> list[dict[str, int]]:
    """Return the samples by length in about a dozen bins of equal width, from the count of each
    length."""
    longest = int(np.flatnonzero(counts).max(initial=0))
    # Widths are 4, 6, 8, 12, 16, 24, ...: the least with which the bins are few enough.
    width = 4
    while width * HISTOGRAM_BINS <= longest:
        is_power = width & (width - 1) == 0
        width = width * 3 // 2 if is_power else width * 4 // 3
    bins = []
    for start in range(0, longest + 1, width):
        samples = int(counts[start : start + width].sum())
        bins.append({"from": start, "to": start + width - 1, "samples": samples})
    return bins


def print_report(report: dict[str, Any]) -> None:
    """Prints sources, skips with their reasons, and the lengths' histogram."""
    console = Console()
    console.print(sources_table(report))
    console.print(draws_table(report))
    if report["skipped"]:
        console.print(skips_table(report["skipped"]))
    console.print(histogram_table(report["histogram"]))
    for note in report["notes"]:
        console.print(f"note: {note}")


def sources_table(report: dict[str, Any]) -> Table:
    """Return what each source is."""
    records = []
    for name, row in report["sources"].items():
        length = row["length"] or {"mean": 0, "longest": 0}
        records.append(
            {
                "source": name,
                "samples": f"{row['samples']:,}",
                "wrong": f"{row['wrong_samples']:,}",
                "mean length": f"{length['mean']:.1f}",
                "longest": f"{length['longest']:,}",
                "at end": row["at_end"],
                "sha256": row["sha256"][:12],
            }
        )
    return terminal_table(pd.DataFrame(records), "sources", padding=(0, 0, 0, 1))


def draws_table(report: dict[str, Any]) -> Table:
    """Return what each source gives."""
    unit = report["weights_by"]
    columns = ["source", f"asked, {unit}", "samples", "tokens*"]
    columns += ["drawn", "tokens*", "passes", "skipped"]
    rows = []
    for name, row in report["sources"].items():
        texts = [
            name,
            percent(row["asked_share"]),
            percent(row["drawn_share"]),
            percent(row["supervised_share"]),
            f"{row['drawn']:,}",
            f"{row['supervised_tokens']:,}",
            f"{row['passes']:.2f}",
            f"{row['skipped']:,}",
        ]
        rows.append(texts)
    title = (
        f"{report['samples']:,} samples, {report['steps']:,} steps of "
        f"{report['global_batch_size']}, weights by {unit}"
    )
    frame = pd.DataFrame(rows, columns=columns)
    return terminal_table(frame, title, padding=(0, 0, 0, 1), caption="* supervised")


def skips_table(skipped: list[dict[str, Any]]) -> Table:
    """Return the reasons, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for skip in skipped:
        counts[skip["source"], skip["reason"]] += skip["times"]
    title = f"{counts.total():,} draws skipped, of {len(skipped):,} samples"
    table = Table("source", "times", "reason", title=title, title_justify="left")
    for (source, reason), times in counts.most_common(MAX_REASONS):
        table.add_row(source, str(times), reason)
    if len(counts) > MAX_REASONS:
        table.add_row("", "", f"and {len(counts) - MAX_REASONS} more, in mixture.json")
    return table


def histogram_table(bins: list[dict[str, int]]) -> Table:
    """Return a bar for each bin of lengths."""
    table = Table(title="lengths in tokens", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("")
    most = max((row["samples"] for row in bins), default=0) or 1
    for row in bins:
        # A bin with few samples shows a sliver instead of nothing.
        bar = "█" * round(BAR_WIDTH * row["samples"] / most)
        if row["samples"] and not bar:
            bar = "▏"
        table.add_row(f"{row['from']:,}-{row['to']:,}", f"{row['samples']:,}", bar)
    return table


def percent(share: float | None) -> str:
    """Return `50.00 %` for 0.5."""
    return "" if share is None else f"{100 * share:.2f} %"
