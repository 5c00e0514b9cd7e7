"""What came of a mixture, in numbers: the contents of `mixture.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from owlfuse.data.duplicates import duplicate_ids
from owlfuse.data.formats.base import Source
from owlfuse.data.mixture import Mixture
from owlfuse.data.packing import Padding

Skips = Collection[tuple[str, ...]]
"""(source, sample, reason) each."""


def mixture_report(
    mixture: Mixture,
    sources: dict[str, Source],
    global_batch_size: int,
    steps: int,
    skipped: Skips,
    truncated: dict[str, int] | None = None,
    padding: Padding | None = None,
) -> dict[str, Any]:
    """What `mixture.json` holds after `steps`: the sources, their hashes, weights and realised counts, skips, cuts, padding."""
    positions = mixture.available(steps * global_batch_size)
    counts = mixture.counts(positions)
    skips = Counter(source for source, _, _ in skipped)
    rows = {name: source_row(mixture, source, counts.get(name, 0), positions) for name, source in sources.items()}
    for name, row in rows.items():
        row.update(skipped=skips[name], truncated=(truncated or {}).get(name, 0))
    return {
        "steps": steps,
        "global_batch_size": global_batch_size,
        "seed": mixture.seed,
        "weights_by": mixture.weights_by,
        "phases": [
            {"step": start / global_batch_size, "shares": {name: float(share) for name, share in phase.items()}}
            for start, phase in mixture.phases
        ],
        "sources": rows,
        "padding": Padding(*padding.counts()).shares() if padding and padding.positions else None,
        "skipped": skip_rows(skipped),
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


def skip_rows(skipped: Skips) -> list[dict[str, str]]:
    """Skips by their names."""
    return [{"source": source, "sample": sample, "reason": reason} for source, sample, reason in skipped]
