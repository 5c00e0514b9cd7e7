"""The schedule by tokens against slow references: the order, its distance from the shares, and
what a far position costs."""

import pickle
from bisect import insort
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.mixture.schedule import Order
from owlfuse.data.mixture.shuffle import Shuffle
from owlfuse.data.mixture.tokens import LARGEST, STEP, TokenOrder, TokenSchedule
from owlfuse.data.mixture.windows import Group, TokenSums, best, distances, merging

few = settings(max_examples=30, deadline=None, derandomize=True)


def made_lengths(generator: np.random.Generator, size: int) -> np.ndarray:
    """Lengths of one of four kinds: even, all alike, a few very long, mostly none."""
    kind = generator.integers(4)
    if kind == 0:
        found = generator.integers(0, 100, size)
    elif kind == 1:
        found = np.full(size, generator.integers(1, 500))
    elif kind == 2:
        found = np.minimum(3000, generator.pareto(1, size) * 20).astype(np.int64)
    else:
        found = (generator.random(size) < 0.1) * 300
    found[0] = max(found[0], 1)
    return found


def made_mixture(seed: int, most: int = 12, **options) -> Mixture:
    """Sources of sizes from 1 to 3,000, weights over six decades."""
    generator = np.random.default_rng(seed)
    sizes = {
        f"s{i}": int(generator.choice([1, 2, 7, 60, 3000]))
        for i in range(generator.integers(1, most + 1))
    }
    weights = {
        name: float(generator.choice([1, 2, 10.0 ** generator.uniform(-5, 1)])) for name in sizes
    }
    lengths = {name: made_lengths(generator, size) for name, size in sizes.items()}
    mixture = Mixture(sizes, weights, seed, lengths=lengths, **options)
    mixture.counted = [lengths[name] for name in mixture.names]
    # where all are alike, too
    mixture.schedule = TokenSchedule(mixture.schedule.rules, mixture.counted, mixture.shuffles)
    return mixture


def slow_order(group: Group, draws: list[list[int]]) -> list[tuple[int, int]]:
    """(source, tokens) of a group's samples: all of them, merged by exact fractions."""
    if not group.members:
        return [(group.source, tokens) for tokens in draws[group.source]]
    jobs: list[tuple] = []
    for place, member in enumerate(group.members):
        clock = 0
        for number, (source, tokens) in enumerate(slow_order(member, draws)):
            insort(
                jobs,
                ((2 * clock + tokens) * STEP // (2 * member.weight), place, number, source, tokens),
            )
            clock += tokens
    return [(source, tokens) for *_, source, tokens in jobs]


@few
@given(seed=st.integers(0, 2**32))
def test_the_order_is_that_of_merging_all_samples_from_the_start(seed):
    mixture = made_mixture(seed, 4)
    order = mixture.schedule.stretch(0).order
    draws = [
        lengths[shuffle.between(0, 300)].tolist()
        for lengths, shuffle in zip(mixture.counted, mixture.shuffles)
    ]
    reference = slow_order(order.group, draws)
    used_up = min(
        max(k for k, (source, _) in enumerate(reference) if source == i) for i in range(len(draws))
    )
    assert mixture.schedule.sources(0, used_up // 2).tolist() == [
        source for source, _ in reference[: used_up // 2]
    ]


@few
@given(seed=st.integers(0, 2**32), start=st.sampled_from([0, 10**6, 10**12]))
def test_every_prefix_is_as_near_to_the_shares_as_is_proven(seed, start):
    """From a far position on, too: what was before is known from whole epochs alone."""
    mixture = made_mixture(seed, 20)
    sources, indices = mixture.positions(start, start + 6000)
    before = [
        epochs_before(*each)
        for each in zip(mixture.counted, mixture.shuffles, mixture.schedule.drawn(start).tolist())
    ]
    longest, distance = (
        max(int(counts.max()) for counts in mixture.counted),
        mixture.schedule.distance(0),
    )
    assert max(distance) <= longest
    tokens = np.array(
        [
            mixture.counted[source][index]
            for source, index in zip(sources.tolist(), indices.tolist())
        ]
    )
    each = [np.cumsum(np.where(sources == i, tokens, 0)).tolist() for i in range(len(before))]
    total = np.cumsum(tokens).tolist()
    for i, share in enumerate(mixture.shares):
        away = [
            abs(before[i] + each[i][k] - share * (sum(before) + total[k]))
            for k in range(0, 6000, 7)
        ]
        assert max(away) <= distance[i] + 0.01


@settings(few, max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_sources_stand_even_again_where_a_phase_begins_or_one_drops_out(seed):
    mixture = made_mixture(
        seed, 6, weights_at={700: {"s0": 3}, 10_000: {"s0": 0.01}}, at_end="once"
    )
    length = mixture.available(10**9)
    sources, indices = mixture.positions(0, length)
    tokens = np.array(
        [
            mixture.counted[source][index]
            for source, index in zip(sources.tolist(), indices.tolist())
        ]
    )
    for source, size in enumerate(map(len, mixture.counted)):
        assert sorted(indices[sources == source]) == list(range(size))
    for stretch in mixture.schedule.stretches:
        shares, distance = stretch.order.shares, mixture.schedule.distance(stretch.start)
        here = slice(stretch.start, stretch.stop)
        total = np.cumsum(tokens[here]).tolist()
        for source, share in enumerate(shares):
            own = np.cumsum(np.where(sources[here] == source, tokens[here], 0)).tolist()
            assert all(
                abs(mine - share * all_) <= distance[source] + 0.01
                for mine, all_ in list(zip(own, total))[::5]
            )
        used_up = {source: 40 * source + 7 for source, share in enumerate(shares) if share}
        assert stretch.order.first_of(used_up) == Order.first_of(stretch.order, used_up)


def epochs_before(lengths: np.ndarray, shuffle: Shuffle, draws: int) -> int:
    """Tokens of a source's first draws."""
    epochs, left = divmod(draws, len(lengths))
    return epochs * int(lengths.sum()) + int(lengths[shuffle.between(draws - left, draws)].sum())


@few
@given(seed=st.integers(0, 2**32), position=st.integers(0, 10**13))
def test_a_position_asked_for_first_is_what_it_is_among_others(seed, position):
    mixture = made_mixture(seed)
    sources, indices = mixture.positions(position, position + 30_000)
    counts = mixture.schedule.drawn(position)
    for ahead in (0, 1, 17_000, 29_999):
        fresh = made_mixture(seed)
        assert fresh[position + ahead] == (mixture.names[sources[ahead]], int(indices[ahead]))
        drawn = counts + np.bincount(sources[:ahead], minlength=len(counts))
        assert fresh.schedule.drawn(position + ahead).tolist() == drawn.tolist()


@pytest.mark.parametrize("position", [10**5, 10**9, 10**15])
def test_a_far_position_costs_one_epochs_table_of_each_source_and_a_few_frames(
    monkeypatch, position
):
    """Counted, from nothing: draws that are shuffled, and streams that are merged."""
    size, made, merges = 100_000, [], []
    between, part = Shuffle.between, TokenOrder.part
    monkeypatch.setattr(
        Shuffle,
        "between",
        lambda self, start, stop: made.append(stop - start) or between(self, start, stop),
    )
    monkeypatch.setattr(
        TokenOrder, "part", lambda self, *where: merges.append(where) or part(self, *where)
    )
    lengths = {name: np.random.default_rng(0).integers(1, 300, size) for name in "abc"}
    mixture = Mixture(dict.fromkeys("abc", size), {"a": 5, "b": 1, "c": 0.3}, lengths=lengths)
    mixture[position]
    assert sum(made) <= 3 * 3 * size
    assert len(merges) < 100
    mixture[position + 1]
    assert sum(made) <= 3 * 3 * size


def test_an_epoch_holds_every_sample_once_and_another_order_each_time():
    mixture = Mixture(
        {"a": 50, "b": 3000}, {"a": 1, "b": 60}, lengths={"a": np.arange(50), "b": np.arange(3000)}
    )
    sources, indices = mixture.positions(0, 40_000)
    for source, size in ((0, 50), (1, 3000)):
        epochs = indices[sources == source][: 2 * size].reshape(2, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
        assert not np.array_equal(*epochs)


@few
@given(data=st.data(), size=st.sampled_from([1, 3, 40, 20_000]))
def test_sums_of_tokens_are_those_of_the_draws_one_by_one(data, size):
    lengths = np.random.default_rng(size).integers(0, 3, size)
    lengths[0] = 2
    shuffle = Shuffle(size, 5, 0)
    sums = TokenSums(lengths, shuffle)
    whole = lengths[shuffle.between(0, 70_000)]
    before = np.concatenate([[0], np.cumsum(whole)])
    draw, stop = sorted(data.draw(st.tuples(st.integers(0, 60_000), st.integers(0, 60_000))))
    assert sums.before(draw) == before[draw]
    assert sums.between(draw, stop).tolist() == whole[draw:stop].tolist()
    tokens = data.draw(st.integers(0, int(before[60_000])))
    assert sums.reach(tokens) == np.argmax(before >= tokens)


@few
@given(weights=st.lists(st.integers(1, 2**20), min_size=1, max_size=5), data=st.data())
def test_distances_are_those_of_the_worst_that_members_can_be_at(weights, data):
    """At a time T a stream is at weight * T and up to half of its longest sample to either side:
    the corners are tried."""
    longest = data.draw(
        st.lists(st.integers(1, 1000), min_size=len(weights), max_size=len(weights))
    )
    group = best(
        tuple(Group(*each, (), i, 10 / each[0]) for i, each in enumerate(zip(weights, longest)))
    )
    found = distances(group)
    assert sorted(found) == list(range(len(weights)))
    worst = dict.fromkeys(found, Fraction(0))

    def corners(group, path):
        halves = [Fraction(member.longest, 2) for member in group.members]
        for place, member in enumerate(group.members):
            away = halves[place] - Fraction(member.weight, group.weight) * (
                2 * halves[place] - sum(halves)
            )
            corners(member, [*path, away / member.weight])
        if not group.members:
            worst[group.source] = sum(path) * group.weight

    corners(group, [])
    assert worst == found


def test_a_mixture_sent_to_a_worker_leaves_its_tables_behind():
    lengths = {name: np.ones(50_000, dtype=np.int64) for name in "ab"}
    mixture = Mixture(dict.fromkeys("ab", 50_000), {"a": 1, "b": 2}, lengths=lengths)
    alone = len(pickle.dumps(mixture))
    found = mixture[10**6]
    sent = pickle.dumps(mixture)
    assert len(sent) < alone + 300_000
    assert pickle.loads(sent)[10**6] == found


@few
@given(data=st.data(), most=st.sampled_from([4, 5, 9, 300]))
def test_no_source_of_any_number_can_be_further_than_the_longest_sample_from_its_share(data, most):
    seed = data.draw(st.integers(0, 2**32))
    generator = np.random.default_rng(seed)
    weights = tuple(
        (10 ** generator.uniform(0, 6, int(generator.integers(1, most + 1)))).astype(int).tolist()
    )
    longest = tuple(generator.choice([1, 70, 99, 100], len(weights)).tolist())
    found = distances(merging(weights, longest))
    assert sorted(found) == list(range(len(weights)))
    assert max(found.values()) <= max(longest)


@pytest.mark.parametrize("seed", range(4))
def test_where_all_samples_are_of_one_length_no_source_is_ever_a_whole_sample_from_its_share(seed):
    generator = np.random.default_rng(seed)
    sizes = {f"s{i:02}": int(generator.integers(1, 60)) for i in range(40)}
    weights = {name: float(generator.integers(1, 50)) for name in sizes}
    mixture = Mixture(
        sizes, weights, seed, lengths={name: np.full(size, 70) for name, size in sizes.items()}
    )
    sources = mixture.positions(0, 3000)[0]
    for number, share in enumerate(mixture.shares):
        away = np.abs(np.cumsum(sources == number) - float(share) * np.arange(1, 3001))
        assert away.max() < 1 + 1e-9


def test_samples_too_long_for_whole_numbers_are_told():
    long = {"a": np.array([LARGEST // 8]), "b": np.array([1])}
    with pytest.raises(
        ValueError,
        match="the sources' longest samples have 268,435,457 supervised tokens, expected",
    ):
        Mixture({"a": 1, "b": 1}, {"a": 1, "b": 1}, lengths=long)


def test_very_long_samples_beside_very_short_ones_keep_their_shares():
    lengths = {"a": np.array([10**8, 1, 7]), "b": np.full(40, 3)}
    mixture = Mixture({"a": 3, "b": 40}, {"a": 1, "b": 2.0**-19}, lengths=lengths)
    sources, indices = mixture.positions(10**12, 10**12 + 4000)
    assert set(sources.tolist()) == {0, 1}
    assert mixture[10**12 + 3999] == (mixture.names[sources[-1]], int(indices[-1]))
