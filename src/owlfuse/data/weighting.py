"""From the keys of the data node to a mixture."""

from __future__ import annotations

from typing import Any

import numpy as np

from owlfuse.data.formats.base import Source
from owlfuse.data.lengths import Lengths
from owlfuse.data.mixture import Mixture, tempered
from owlfuse.data.positions import StepPositions


def make_mixture(
    sources: dict[str, Source],
    seed: int,
    step_positions: StepPositions,
    weights_at: dict[int, dict[str, float]] | None = None,
    at_end: str | dict[str, str] = "repeat",
    temperature: float | None = None,
    lengths: dict[str, Lengths] | None = None,
) -> Mixture:
    """The mixture of sources by their weights.

    Args:
        step_positions: where optimizer steps stand in the schedule.
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
    positions = {step_positions.position(step): phase for step, phase in phases.items()}
    return Mixture(sizes, weights, seed, weights_at=positions, at_end=at_end, lengths=supervised)


def as_step(key: Any) -> int:
    """A key of `weights_at` as an optimizer step."""
    if isinstance(key, bool) or not str(key).isdigit():
        raise ValueError(f"weights_at: {key}: expected an optimizer step from 0 on")
    return int(key)
