"""What came of a mixture, in numbers: the contents of `mixture.json`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from owlfuse.core.progress import track
from owlfuse.data.formats.base import Source
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.notes import NoteCounts
from owlfuse.data.packing import Padding

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
    """What `mixture.json` holds after `steps`: the sources, their hashes, weights and realised
    counts, skips, cuts, in how many draws a key was not used or something was assumed, padding."""
    positions = mixture.available(step_positions.position(steps))
    counts = mixture.counts(positions)
    skips = Counter(skipped)
    rows = {
        name: source_row(mixture, source, counts.get(name, 0), positions)
        for name, source in sources.items()
    }
    for name, row in rows.items():
        mine = [(sample, times) for (source, sample, _), times in skips.items() if source == name]
        row.update(
            skipped=sum(times for _, times in mine),
            skipped_samples=len({sample for sample, _ in mine}),
        )
        row.update(truncated=(truncated or {}).get(name, 0))
        row.update(
            notes={
                text: draws
                for (source, text), draws in sorted((notes or {}).items())
                if source == name
            }
        )
    return {
        "steps": steps,
        "samples": positions,
        "global_batch_size": step_positions.changes[-1][2],
        "global_batch_sizes": [
            {"step": step, "sample": position, "size": size}
            for step, position, size in step_positions.changes
        ],
        "seed": mixture.seed,
        "weights_by": mixture.weights_by,
        "phases": [
            {
                "step": step_positions.step(start),
                "shares": {name: float(share) for name, share in phase.items()},
            }
            for start, phase in mixture.phases
        ],
        "sources": rows,
        "padding": Padding(*padding.counts()).shares() if padding and padding.positions else None,
        "skipped": skip_rows(skips),
    }


def source_row(mixture: Mixture, source: Source, drawn: int, positions: int) -> dict[str, Any]:
    """A source of the mixture, of which `positions` samples were drawn in all and `drawn` from
    it."""
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
    sources: dict[str, Source],
    skipped: Collection[tuple[str, str, str]],
    truncated: Collection[tuple[str, str, int]],
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
    cut = [
        {"source": source, "sample": sample, "turns_removed": turns}
        for source, sample, turns in truncated
    ]
    return {"sources": rows, "skipped": skip_rows(skipped), "truncated": cut}


def skip_rows(skipped: Skips) -> list[dict[str, Any]]:
    """A row for each sample that was left out, and how many times it was drawn."""
    return [
        {"source": source, "sample": sample, "reason": reason, "times": times}
        for (source, sample, reason), times in Counter(skipped).items()
    ]


LOOKED_AT = 2**20
"""Samples of a source whose ids are read and compared: the first that are drawn."""
LONG = 2**15
"""Samples whose reading shows its progress."""


def duplicate_ids(mixture: Mixture, source: Source, drawn: int) -> dict[str, Any]:
    """How many records of the samples that a source gave bear an id that one before them in the
    file bears too.

    Ids are compared by hashes of 64 bits, 16 bytes of memory a record; a record without an id is
    called by its place.

    Args:
        drawn: how many times the source was drawn from.

    Returns:
        `count`; `looked_at`: samples that were compared; `first`: `{"id", "samples"}`, the indices
            of the first two, or None.
    """
    looked_at = min(drawn, len(source), LOOKED_AT)
    found: dict[str, Any] = {"count": 0, "looked_at": looked_at, "first": None}
    if not looked_at:
        return found
    shuffle = mixture.shuffles[mixture.names.index(source.name)]
    hashes, owners = hashed_ids(source, np.sort(shuffle.between(0, looked_at)).tolist())
    order = np.argsort(hashes, kind="stable")  # of equal ones the earlier stays before the later
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if len(again):
        first = again[order[again + 1].argmin()]
        pair = owners[order[first : first + 2]].tolist()
        shared = Counter(identity for _, identity in source.ids(sorted(set(pair)))).most_common(1)[
            0
        ][0]
        found.update(count=len(again), first={"id": shared, "samples": pair})
    return found


def hashed_ids(source: Source, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each record's id, uint64, and the index of the sample that it is in; a record
    that is wrong is left out."""
    hashes, owners = array("Q"), array("q")
    found: Iterable[tuple[int, str]] = source.ids(indices)
    if len(indices) >= LONG:
        title = f"comparing ids of {source.name}"
        found = track(found, title, len(indices))
    for index, identity in found:
        hashes.append(hash(identity) & 2**64 - 1)
        owners.append(index)
    return np.frombuffer(hashes, dtype=np.uint64), np.frombuffer(owners, dtype=np.int64)
