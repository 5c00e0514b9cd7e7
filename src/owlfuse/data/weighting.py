"""From the keys of the data node to a mixture, and what came of it in numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from owlfuse.data.formats.base import Source
from owlfuse.data.lengths import Lengths
from owlfuse.data.mixture import Mixture, tempered


def make_mixture(
    sources: dict[str, Source],
    seed: int,
    global_batch_size: int,
    weights_at: dict[int, dict[str, float]] | None = None,
    at_end: str | dict[str, str] = "repeat",
    temperature: float | None = None,
    lengths: dict[str, Lengths] | None = None,
) -> Mixture:
    """The mixture of sources by their weights.

    Args:
        weights_at: weights from an optimizer step on, by source.
        at_end: as of `Mixture`.
        temperature: multiplies each weight with size^(1 / temperature), the size in samples, or in supervised tokens with
            `lengths`.
        lengths: what each source's samples hold; with them the shares are of supervised tokens.

    Raises:
        ValueError: as of `Mixture`.
    """
    sizes = {name: len(source) for name, source in sources.items()}
    weights: dict[str, Any] = {name: source.weight for name, source in sources.items()}
    phases = {as_step(step): dict(phase) for step, phase in (weights_at or {}).items()}
    supervised = None if lengths is None else {name: found.supervised.astype(np.int64) for name, found in lengths.items()}
    if temperature is not None:
        large = sizes if supervised is None else {name: int(counts.sum()) for name, counts in supervised.items()}
        known = {name: {**weights, **phase} for name, phase in phases.items()}
        phases = {step: {n: tempered(large, known[step], temperature)[n] for n in phase} for step, phase in phases.items()}
        weights = tempered(large, weights, temperature)
    positions = {step * global_batch_size: phase for step, phase in phases.items()}
    return Mixture(sizes, weights, seed, weights_at=positions, at_end=at_end, lengths=supervised)


def as_step(key: Any) -> int:
    """A key of `weights_at` as an optimizer step."""
    if isinstance(key, bool) or not str(key).isdigit():
        raise ValueError(f"weights_at: {key}: expected an optimizer step from 0 on")
    return int(key)


def mixture_report(
    mixture: Mixture,
    sources: dict[str, Source],
    global_batch_size: int,
    steps: int,
    skipped: list[tuple[str, ...]],
    truncated: dict[str, int] | None = None,
) -> dict[str, Any]:
    """What `mixture.json` holds after `steps`: the sources, their hashes, weights and realised counts, skips and cuts."""
    asked = steps * global_batch_size
    positions = mixture.available(asked)
    counts = mixture.counts(positions)
    skips = Counter(source for source, _, _ in skipped)
    shares = dict(zip(mixture.names, mixture.shares, strict=True))
    rows = {
        name: {
            "file": str(source.file),
            "sha256": source.fingerprint(),
            "samples": len(source),
            "weight": source.weight,
            "share": float(shares.get(name, 0)),
            "drawn": counts.get(name, 0),
            "drawn_share": counts.get(name, 0) / positions if positions else None,
            "passes": counts.get(name, 0) / len(source),
            "at_end": mixture.ends.get(name, "repeat"),
            "skipped": skips[name],
            "truncated": (truncated or {}).get(name, 0),
        }
        for name, source in sources.items()
    }
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
        "skipped": [{"source": source, "sample": sample, "reason": reason} for source, sample, reason in skipped],
    }
