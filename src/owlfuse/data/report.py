"""What came of a mixture, in numbers: the contents of `mixture.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from owlfuse.data.duplicates import duplicate_ids
from owlfuse.data.formats.base import Source
from owlfuse.data.mixture import Mixture
from owlfuse.data.notes import NoteCounts
from owlfuse.data.packing import Padding
from owlfuse.data.positions import StepPositions

Skips = Iterable[tuple[str, str, str]]
"""(source, sample, reason) of each draw that was left out, or a Counter of them."""


def mixture_report(
    mixture: Mixture,
    sources: dict[str, Source],
    step_positions: StepPositions,
    steps: int,
    skipped: Skips,
    truncated: dict[str, int] | None = None,
    notes: NoteCounts | None = None,
    padding: Padding | None = None,
) -> dict[str, Any]:
    """What `mixture.json` holds after `steps`: the sources, their hashes, weights and realised counts, skips, cuts, in how many
    draws a key was not used or something was assumed, padding."""
    positions = mixture.available(step_positions.position(steps))
    counts = mixture.counts(positions)
    skips = Counter(skipped)
    rows = {name: source_row(mixture, source, counts.get(name, 0), positions) for name, source in sources.items()}
    for name, row in rows.items():
        mine = [(sample, times) for (source, sample, _), times in skips.items() if source == name]
        row.update(skipped=sum(times for _, times in mine), skipped_samples=len({sample for sample, _ in mine}))
        row.update(truncated=(truncated or {}).get(name, 0))
        row.update(notes={text: draws for (source, text), draws in sorted((notes or {}).items()) if source == name})
    return {
        "steps": steps,
        "samples": positions,
        "global_batch_size": step_positions.changes[-1][2],
        "global_batch_sizes": [
            {"step": step, "sample": position, "size": size} for step, position, size in step_positions.changes
        ],
        "seed": mixture.seed,
        "weights_by": mixture.weights_by,
        "phases": [
            {"step": step_positions.step(start), "shares": {name: float(share) for name, share in phase.items()}}
            for start, phase in mixture.phases
        ],
        "sources": rows,
        "padding": Padding(*padding.counts()).shares() if padding and padding.positions else None,
        "skipped": skip_rows(skips),
    }


def source_row(mixture: Mixture, source: Source, drawn: int, positions: int) -> dict[str, Any]:
    """A source of the mixture, of which `positions` samples were drawn in all and `drawn` from it."""
    size = len(source)
    return {
        "file": str(source.file),
        "sha256": source.fingerprint(),
        "samples": size,
        "weight": source.weight,
        "share": float(dict(zip(mixture.names, mixture.shares, strict=True)).get(source.name, 0)),
        "drawn": drawn,
        "drawn_share": drawn / positions if positions else None,
        "passes": drawn / size,
        "left_of_last_pass": size - drawn if drawn < size else -drawn % size,
        "at_end": mixture.ends.get(source.name, "repeat"),
        "duplicate_ids": duplicate_ids(mixture, source, drawn),
    }


def validation_report(
    sources: dict[str, Source], skipped: Collection[tuple[str, str, str]], truncated: Collection[tuple[str, str, int]]
) -> dict[str, Any]:
    """The validation sources, and what was left out of them or cut."""
    skips, cuts = (Counter(source for source, *_ in found) for found in (skipped, truncated))
    rows = {
        name: {
            "file": str(source.file),
            "sha256": source.fingerprint(),
            "samples": len(source),
            "skipped": skips[name],
            "truncated": cuts[name],
        }
        for name, source in sources.items()
    }
    cut = [{"source": source, "sample": sample, "turns_removed": turns} for source, sample, turns in truncated]
    return {"sources": rows, "skipped": skip_rows(skipped), "truncated": cut}


def skip_rows(skipped: Skips) -> list[dict[str, Any]]:
    """A row for each sample that was left out, and how many times it was drawn."""
    return [
        {"source": source, "sample": sample, "reason": reason, "times": times}
        for (source, sample, reason), times in Counter(skipped).items()
    ]
