"""The exact schedule in which samples are drawn: a pure function of (seed, position)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from owlfuse.data.formats.base import Source
from owlfuse.data.mixture.lengths import Lengths
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.mixture.schedule import AT_END, Schedule, shares_by_name
from owlfuse.data.mixture.shuffle import Shuffle, reused_samples

# The least factor of a temperature, so that a low one takes no source out: `exact_shares` gives
# every weight at least 2^-20.
MIN_SIZE_FACTOR = 1e-60


class Mixture:
    """Says for every position which sample of which source stands there, without state.

    Every prefix of a phase holds each source within one sample of its share. Each epoch of a source
    is a new shuffle, which covers every sample once.

    Args:
        sizes: samples of each source.
        weights: relative shares from position 0 on. They are taken as the decimal fractions they
            are written as; where the period would be longer than 2^20, shares of samples are
            rounded to multiples of 2^-20.
        weights_at: other weights from a position on. A source that is not named keeps its weight of
            before.
        at_end: what happens when a source is used up, by source or for all: `repeat` it with a new
            shuffle, `stop` the schedule after its last sample, or use it `once` and give its share
            to the others from there on.
        mean_tokens: mean supervised tokens of each source's samples. With them the weights are
            shares of tokens, and those of samples are proportional to weight / mean.

    Attributes:
        names: the sources that are drawn, in the order of their numbers.
        shuffles: the order of each of them.
        phases: the first position of each phase and the shares that were asked for, by source.
        sample_phases: the same with the shares of samples, which the schedule follows.

    Raises:
        ValueError: a weight that is negative or no number, all weights zero, a source with a weight
            and no sample (or no supervised token), a phase or an `at_end` that names no source.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        weights: Mapping[str, float | Fraction],
        seed: int = 0,
        *,
        weights_at: Mapping[int, Mapping[str, float | Fraction]] | None = None,
        at_end: str | dict[str, str] = "repeat",
        mean_tokens: dict[str, Fraction] | None = None,
    ) -> None:
        phases = phases_of(weights, weights_at or {})
        for _, phase in phases:
            check_weights(sizes, phase)
        if isinstance(at_end, str):
            at_end = dict.fromkeys(sizes, at_end)
        check_at_end(sizes, at_end)
        self.seed = seed
        self.at_end = {name: at_end.get(name, "repeat") for name in sizes}
        self.shuffles = {}
        for number, (name, size) in enumerate(sizes.items()):
            # By its number among all sources, so that a weight of 0 changes no other order.
            if any(phase[name] for _, phase in phases):
                self.shuffles[name] = Shuffle(size, seed, number)
        self.names = list(self.shuffles)
        self.weights_by = "samples" if mean_tokens is None else "tokens"
        self.sample_amounts = mean_tokens or dict.fromkeys(sizes, Fraction(1))
        """How much of what the weights share out a sample of each source has on average."""
        self.phases: list[tuple[int, dict[str, Fraction]]] = []
        self.sample_phases: list[tuple[int, dict[str, Fraction]]] = []
        for start, phase in phases:
            phase_weights = {name: phase[name] for name in self.names}
            self.phases.append((start, shares_by_name(phase_weights)))
            by_sample = sample_weights(phase_weights, self.sample_amounts)
            self.sample_phases.append((start, shares_by_name(by_sample)))
        self.schedule = Schedule(
            [(start, list(shares.values())) for start, shares in self.sample_phases],
            [sizes[name] for name in self.names],
            [self.at_end[name] for name in self.names],
        )

    def positions(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what stands at the positions from `start` to before `stop`, in nanoseconds each.

        Returns:
            numbers of the sources, uint16 (stop - start,), which `names` has in this order; and the
                samples' indices, int64 (stop - start,).

        Raises:
            IndexError: the schedule ends before `stop`.
        """
        self.check_range(start, stop)
        sources = self.schedule.sources(start, stop)
        first_draws = self.schedule.counts_before(start).tolist()
        last_draws = self.schedule.counts_before(stop).tolist()
        indices = np.empty(stop - start, dtype=np.int64)
        for source, shuffle in enumerate(self.shuffles.values()):
            first, last = first_draws[source], last_draws[source]
            if last > first:
                samples = shuffle.between(first, last, out=reused_samples(last - first))
                # `place` fills the positions of the source in ascending order, that of its draws.
                np.place(indices, sources == source, samples)
        return sources, indices

    def counts(self, positions: int) -> dict[str, int]:
        """Return how many of the first positions each source gives; of all positions, where the
        schedule ends before."""
        counts = self.schedule.counts_before(self.available(positions))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def available(self, positions: int) -> int:
        """Return `positions`, or how many there are where the schedule ends before."""
        return self.schedule.available(positions)

    def asked_shares(self, positions: int) -> dict[str, float]:
        """Return each source's share by the weights over the phases of the first positions.

        A phase counts by its samples, or by the tokens that they have on average where the weights
        are shares of tokens.
        """
        amounts = dict.fromkeys(self.names, 0.0)
        starts = [start for start, _ in self.phases]
        stops = [*starts[1:], positions]
        for (start, shares), (_, sample_shares), stop in zip(
            self.phases, self.sample_phases, stops, strict=True
        ):
            samples = max(0, min(stop, positions) - start)
            mean_amount = Fraction(0)
            for name, share in sample_shares.items():
                mean_amount += share * self.sample_amounts[name]
            for name, share in shares.items():
                amounts[name] += float(share) * samples * float(mean_amount)
        total = sum(amounts.values())
        return {name: amount / total for name, amount in amounts.items()} if total else amounts

    def check_range(self, start: int, stop: int) -> None:
        """Raise IndexError for positions that are not there."""
        if start < 0 or self.available(stop) < stop:
            raise IndexError(
                f"position {stop - 1 if start >= 0 else start}: the schedule has "
                f"{self.available(stop):,} positions"
            )


def phases_of(
    weights: Mapping[str, float | Fraction],
    weights_at: Mapping[int, Mapping[str, float | Fraction]],
) -> list[tuple[int, dict[str, float | Fraction]]]:
    """Return the weights of all sources from each phase's first position on.

    Raises:
        ValueError: a phase before position 0, or one that names no source.
    """
    check_phases(weights, weights_at)
    current = dict(weights)
    phases = {0: current}
    for start in sorted(weights_at):
        current = {**current, **weights_at[start]}
        phases[start] = current
    return list(phases.items())


def check_phases(names: Collection[str], weights_at: Mapping[int, Collection[str]]) -> None:
    """Raise ValueError for a phase before 0 or of an unknown source."""
    for start, phase in weights_at.items():
        if start < 0:
            raise ValueError(f"weights_at {start}: expected a position from 0 on")
        for name in phase:
            if name not in names:
                raise ValueError(
                    f"weights_at {start} names {name}, which is no source; they are "
                    f"{', '.join(names)}"
                )


def check_weights(sizes: dict[str, int], weights: Mapping[str, float | Fraction]) -> None:
    """Raise ValueError for weights that make no mixture, naming the source."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"source {name} has weight {weight}, expected a number of at least 0")
        if weight > 0 and sizes[name] == 0:
            raise ValueError(f"source {name} has weight {weight} and no sample")
    if not any(weights.values()):
        raise ValueError(f"the weights of all sources ({', '.join(weights) or 'none'}) are 0")


def check_at_end(sizes: dict[str, int], at_end: dict[str, str]) -> None:
    """Raise ValueError for an `at_end` of an unknown source or kind."""
    for name, policy in at_end.items():
        if name not in sizes:
            raise ValueError(
                f"at_end names {name}, which is no source; they are {', '.join(sizes)}"
            )
        if policy not in AT_END:
            raise ValueError(f"at_end of source {name} is {policy}, expected {', '.join(AT_END)}")


def sample_weights(
    weights: Mapping[str, float | Fraction], sample_amounts: Mapping[str, Fraction]
) -> dict[str, Fraction]:
    """Return the weights of samples that share out, on average, what the samples have by `weights`.

    Raises:
        ValueError: a source with a weight whose samples have nothing of it.
    """
    by_sample = {}
    for name, weight in weights.items():
        if weight and not sample_amounts[name]:
            raise ValueError(
                f"source {name} has weight {weight} and no supervised token, of which "
                "weights_by=tokens makes shares; give it weight 0"
            )
        by_sample[name] = Fraction(0)
        if weight:
            # as it is written: 0.1 is a tenth, and not the float nearest to it
            by_sample[name] = Fraction(str(weight)) / sample_amounts[name]
    return by_sample


def tempered(
    sizes: Mapping[str, int], weights: Mapping[str, float], temperature: float
) -> dict[str, float | Fraction]:
    """Return weights times size^(1 / temperature).

    A temperature of 1 draws in proportion to the sizes, a high one evenly. A weight that `Mixture`
    refuses, of an empty source or no number, is returned as it is.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    largest = max(sizes.values(), default=0)
    result: dict[str, float | Fraction] = {}
    for name, weight in weights.items():
        size = sizes[name]
        if not size or not math.isfinite(weight):
            result[name] = weight
        # Exact, where a power would be a float.
        elif temperature == 1:
            result[name] = Fraction(str(weight)) * size
        else:
            # Relative to the largest: a power of the size itself overflows at a low temperature.
            factor = math.exp(math.log(size / largest) / temperature)
            result[name] = weight * max(factor, MIN_SIZE_FACTOR)
    return result


def make_mixture(
    sources: dict[str, Source],
    seed: int,
    step_positions: StepPositions,
    weights_at: dict[int, dict[str, float]] | None = None,
    at_end: str | dict[str, str] = "repeat",
    temperature: float | None = None,
    lengths: dict[str, Lengths] | None = None,
) -> Mixture:
    """Return the mixture of sources by their weights.

    Args:
        step_positions: where optimizer steps stand in the schedule.
        weights_at: weights from an optimizer step on, by source.
        at_end: as of `Mixture`.
        temperature: multiplies each weight with size^(1 / temperature), the size in samples, or in
            supervised tokens with `lengths`.
        lengths: tokens of each source's samples; with them the weights are shares of supervised
            tokens. A wrong sample counts as one without tokens, which it gives when it is drawn.

    Raises:
        ValueError: as of `Mixture`.
    """
    samples = {name: len(source) for name, source in sources.items()}
    sizes = samples
    mean_tokens = None
    if lengths is not None:
        sizes = {name: counts.total_supervised for name, counts in lengths.items()}
        mean_tokens = {}
        for name, size in samples.items():
            mean_tokens[name] = Fraction(sizes[name], max(size, 1))
    weights: dict[str, Any] = {name: source.weight for name, source in sources.items()}
    phases: dict[int, Any] = {}
    for step, phase in (weights_at or {}).items():
        phases[as_step(step)] = phase
    # Here the phases still begin at steps, as the user wrote them.
    check_phases(sources, phases)
    if temperature is not None:
        weights = tempered(sizes, weights, temperature)
        phases = {step: tempered(sizes, phase, temperature) for step, phase in phases.items()}
    weights_at_positions = {}
    for step, phase in phases.items():
        weights_at_positions[step_positions.position(step)] = phase
    return Mixture(
        samples,
        weights,
        seed,
        weights_at=weights_at_positions,
        at_end=at_end,
        mean_tokens=mean_tokens,
    )


def as_step(key: Any) -> int:
    """Return a key of `weights_at` as an optimizer step."""
    # YAML's `true` is the number 1 in Python.
    if isinstance(key, bool) or not str(key).isdecimal():
        raise ValueError(f"weights_at: {key}: expected an optimizer step from 0 on")
    return int(key)
