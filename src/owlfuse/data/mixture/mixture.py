"""The exact schedule in which samples are drawn: a pure function of (seed, position)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from owlfuse.data.formats.base import Source
from owlfuse.data.mixture.lengths import Lengths
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.mixture.schedule import ENDS, Rules, SampleSchedule, exact_shares
from owlfuse.data.mixture.shuffle import SCRATCH, Shuffle
from owlfuse.data.mixture.tokens import TokenSchedule

LEAST = 1e-60
"""What a power of a size is at least, so that a low temperature takes no source out: a share is
2^-20 at least."""


class Mixture:
    """Says for every position which sample of which source stands there, without state.

    By samples, every prefix of a phase holds each source within one sample of its weight's share.
    By supervised tokens (`lengths` given), every prefix of a phase holds each source's tokens
    within the longest sample's of any source of its share (`merging`; `schedule.distance` says how
    many tokens). Each epoch of a source is a new shuffle, which covers every sample once.

    Args:
        sizes: samples of each source.
        weights: relative shares from position 0 on. They are taken as the decimal fractions they
            are written as; where the period would be longer than 2^20, as multiples of 2^-20.
        weights_at: other weights from a position on. A source that is not named keeps its weight of
            before.
        at_end: what happens when a source is used up, by source or for all: `repeat` it with a new
            shuffle, `stop` the schedule after its last sample, or use it `once` and give its share
            to the others from there on.
        lengths: supervised tokens of each sample, by source; with them the shares are of tokens.

    Raises:
        ValueError: a weight that is negative or no number, all weights zero, a source with a weight
            and no sample (or no supervised token), a phase or an `at_end` that names no source.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        weights: dict[str, float],
        seed: int = 0,
        *,
        weights_at: dict[int, dict[str, float]] | None = None,
        at_end: str | dict[str, str] = "repeat",
        lengths: dict[str, np.ndarray] | None = None,
    ) -> None:
        phases = phases_of(weights, weights_at or {})
        for _, phase in phases:
            check_weights(sizes, phase)
        ends = at_end if isinstance(at_end, dict) else dict.fromkeys(sizes, at_end)
        check_ends(sizes, ends)
        numbers = {name: number for number, name in enumerate(sizes)}
        self.names = [name for name in sizes if any(phase[name] for _, phase in phases)]
        self.sizes = sizes
        self.seed = seed
        self.ends = ends
        self.weights_by = "samples" if lengths is None else "tokens"
        self.phases = [
            (start, dict(zip(self.names, exact_shares([p[n] for n in self.names]))))
            for start, p in phases
        ]
        self.shares = list(self.phases[0][1].values())
        rules = Rules(
            [(start, list(shares.values())) for start, shares in self.phases],
            [sizes[name] for name in self.names],
            [ends.get(name, "repeat") for name in self.names],
        )
        self.shuffles = [Shuffle(sizes[name], seed, numbers[name]) for name in self.names]
        if lengths is None:
            self.schedule: SampleSchedule | TokenSchedule = SampleSchedule(rules)
            return
        check_lengths(sizes, lengths, self.names)
        counts = [lengths[name] for name in self.names]
        if (
            len({bound for tokens in counts for bound in (int(tokens.min()), int(tokens.max()))})
            == 1
        ):
            # shares of tokens are shares of samples, and held as closely as those
            self.schedule = SampleSchedule(rules)
        else:
            self.schedule = TokenSchedule(rules, counts, self.shuffles)

    def __getitem__(self, position: int) -> tuple[str, int]:
        """The source's name and the sample's index in it, at a position from 0.

        Raises IndexError after the schedule's end.
        """
        self.check_range(position, position + 1)
        source = int(self.schedule.sources(position, position + 1)[0])
        return self.names[source], self.shuffles[source][int(self.schedule.drawn(position)[source])]

    def positions(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions from `start` to before `stop`, each as by `mixture[position]`, in
        nanoseconds each.

        Returns:
            numbers of the sources, uint16 (stop - start,), which `names` has in this order; and the
                samples' indices, int64.

        Raises:
            IndexError: the schedule ends before `stop`.
        """
        self.check_range(start, stop)
        sources = self.schedule.sources(start, stop)
        before, after = self.schedule.drawn(start).tolist(), self.schedule.drawn(stop).tolist()
        indices = np.empty(stop - start, dtype=np.int64)
        for source, shuffle in enumerate(self.shuffles):
            if after[source] > before[source]:
                room = SCRATCH.room(after[source] - before[source])
                np.place(
                    indices, sources == source, shuffle.between(before[source], after[source], room)
                )
        return sources, indices

    def counts(self, positions: int) -> dict[str, int]:
        """How many of the first `positions` samples each source gives; of all samples, where the
        schedule ends before."""
        return dict(zip(self.names, self.schedule.drawn(self.available(positions)).tolist()))

    def available(self, positions: int) -> int:
        """`positions`, or how many there are where the schedule ends before."""
        return self.schedule.available(positions)

    def check_range(self, start: int, stop: int) -> None:
        """Raises IndexError for positions that are not there."""
        if start < 0 or self.available(stop) < stop:
            raise IndexError(
                f"position {stop - 1 if start >= 0 else start}: the schedule has "
                f"{self.available(stop):,} positions"
            )


def phases_of(
    weights: dict[str, float], weights_at: dict[int, dict[str, float]]
) -> list[tuple[int, dict[str, float]]]:
    """The weights of all sources from each phase's first position on."""
    phases = {0: dict(weights)}
    for start in sorted(weights_at):
        for name in weights_at[start]:
            if name not in weights:
                raise ValueError(
                    f"weights_at {start} names {name}, which is no source; they are "
                    f"{', '.join(weights)}"
                )
        if start < 0:
            raise ValueError(f"weights_at {start}: expected a position from 0 on")
        phases[start] = {**list(phases.values())[-1], **weights_at[start]}
    return list(phases.items())


def check_weights(sizes: dict[str, int], weights: dict[str, float]) -> None:
    """Raises ValueError for weights that make no mixture, naming the source."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"source {name} has weight {weight}, expected a number of at least 0")
        if weight > 0 and sizes[name] == 0:
            raise ValueError(f"source {name} has weight {weight} and no sample")
    if not any(weights.values()):
        raise ValueError(f"the weights of all sources ({', '.join(weights) or 'none'}) are 0")


def check_ends(sizes: dict[str, int], ends: dict[str, str]) -> None:
    """Raises ValueError for an `at_end` that is none."""
    for name, end in ends.items():
        if name not in sizes:
            raise ValueError(
                f"at_end names {name}, which is no source; they are {', '.join(sizes)}"
            )
        if end not in ENDS:
            raise ValueError(f"at_end of source {name} is {end}, expected {', '.join(ENDS)}")


def check_lengths(sizes: dict[str, int], lengths: dict[str, np.ndarray], names: list[str]) -> None:
    """Raises ValueError where shares of tokens cannot be made."""
    for name in names:
        if name not in lengths or len(lengths[name]) != sizes[name]:
            raise ValueError(
                f"source {name} has {sizes[name]} samples and {len(lengths.get(name, ()))} counts "
                "of their tokens"
            )
        if not lengths[name].any():
            raise ValueError(f"source {name} has a weight and no supervised token")


def tempered(
    sizes: dict[str, int], weights: dict[str, float], temperature: float
) -> dict[str, Any]:
    """Weights times size^(1 / temperature): 1 draws in proportion to the sizes, a high one evenly.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    if temperature == 1:
        return {name: Fraction(str(weights[name])) * size for name, size in sizes.items()}
    largest = max(sizes.values())
    powers = {
        name: math.exp(math.log(size / largest) / temperature) if size else 0.0
        for name, size in sizes.items()
    }
    return {
        name: weights[name] * max(power, LEAST) if sizes[name] else 0.0
        for name, power in powers.items()
    }


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
        temperature: multiplies each weight with size^(1 / temperature), the size in samples, or in
            supervised tokens with `lengths`.
        lengths: what each source's samples hold; with them the shares are of supervised tokens.

    Raises:
        ValueError: as of `Mixture`.
    """
    sizes = {name: len(source) for name, source in sources.items()}
    weights: dict[str, Any] = {name: source.weight for name, source in sources.items()}
    phases = {as_step(step): dict(phase) for step, phase in (weights_at or {}).items()}
    supervised = (
        None
        if lengths is None
        else {name: found.supervised.astype(np.int64) for name, found in lengths.items()}
    )
    if temperature is not None:
        large = (
            sizes
            if supervised is None
            else {name: int(counts.sum()) for name, counts in supervised.items()}
        )
        known = {name: {**weights, **phase} for name, phase in phases.items()}
        phases = {
            step: {n: tempered(large, known[step], temperature)[n] for n in phase}
            for step, phase in phases.items()
        }
        weights = tempered(large, weights, temperature)
    positions = {step_positions.position(step): phase for step, phase in phases.items()}
    return Mixture(sizes, weights, seed, weights_at=positions, at_end=at_end, lengths=supervised)


def as_step(key: Any) -> int:
    """A key of `weights_at` as an optimizer step."""
    if isinstance(key, bool) or not str(key).isdigit():
        raise ValueError(f"weights_at: {key}: expected an optimizer step from 0 on")
    return int(key)
