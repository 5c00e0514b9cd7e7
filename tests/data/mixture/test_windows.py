"""Samples in windows of time: how far a source is from its share at any place; frames are found
one without another."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlfuse.data.mixture.shuffle import Shuffle
from owlfuse.data.mixture.windows import Draws, Group, TokenSums, Windows, in_windows

few = settings(max_examples=30, deadline=None, derandomize=True)


def made_windows(seed: int, alike: bool = False, decades: float = 2.0) -> Windows:
    """Two to 30 sources; lengths all alike, or of several kinds, with samples of none."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 31))
    weights = (10 ** generator.uniform(0, decades, count)).astype(int).tolist()
    draws, members = [], []
    for source, weight in enumerate(weights):
        size = int(generator.choice([1, 3, 40, 500]))
        kinds = [
            np.full(size, 60),
            generator.integers(0, 60, size),
            (generator.random(size) < 0.1) * 60,
        ]
        lengths = kinds[0 if alike else generator.integers(3)].astype(np.int64)
        lengths[0] = max(1, lengths[0])
        sums = TokenSums(lengths, Shuffle(size, seed, source))
        draws.append(Draws(sums, int(generator.integers(0, 1000))))
        members.append(Group(weight, sums.longest, (), source, 0.0))
    return Windows(in_windows(tuple(members)), draws, pace=2**14 / 20_000)


@few
@given(seed=st.integers(0, 2**32), alike=st.booleans(), start=st.sampled_from([0, 10**5, 10**12]))
def test_at_every_place_a_source_is_as_near_to_its_share_as_is_proven(seed, alike, start):
    windows = made_windows(seed, alike)
    before, sources, tokens = windows.between(start, start + 3 * windows.frame)
    total = before.tokens + np.concatenate([[0], np.cumsum(tokens)])
    for member, draws, drawn in zip(windows.members, windows.draws, before.drawn):
        own = draws.before(drawn) + np.concatenate(
            [[0], np.cumsum(np.where(sources == member.source, tokens, 0))]
        )
        away = np.abs(own * windows.weight - member.weight * total).max() / windows.weight
        share = Fraction(member.weight, windows.weight)
        assert (
            away
            <= member.longest * (1 - share) + share * windows.longest / 2 + share / windows.step
        )


@few
@given(seed=st.integers(0, 2**32), start=st.sampled_from([0, 10**5, 10**12]))
def test_frames_hold_every_draw_once_and_in_order_and_are_what_they_are_alone(seed, start):
    windows, length = made_windows(seed), 3 * made_windows(seed).frame
    before, sources, tokens = windows.between(start, start + length)
    for member, draws, drawn in zip(windows.members, windows.draws, before.drawn):
        own = tokens[sources == member.source]
        assert own.tolist() == draws.between(drawn, drawn + len(own)).tolist()
    later, alone, _ = made_windows(seed).between(start + length - windows.frame, start + length)
    assert alone.tolist() == sources[-len(alone) :].tolist()
    assert sum(later.drawn) == sum(before.drawn) + len(sources) - len(alone)


@pytest.mark.parametrize("seed", range(3))
def test_frames_hold_where_one_source_is_a_thousand_times_lighter(seed):
    windows = made_windows(seed, decades=5)
    before, sources, _ = windows.between(0, 1)
    assert before.drawn == [0] * len(windows.members)
    assert all(
        windows.frame * member.weight >= member.longest * windows.weight
        for member in windows.members
    )
    assert len(sources) == sum(windows.cut(1).drawn)


def test_a_worker_is_sent_no_frames():
    windows = made_windows(1)
    alone = len(pickle.dumps(windows))
    windows.between(0, 10**5)
    assert len(pickle.dumps(windows)) == alone
