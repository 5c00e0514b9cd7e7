"""The schedule against brute force: any sizes, weights, ends, phases, positions, ranks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from owlfuse.data.loading import GlobalBatchSampler
from owlfuse.data.mixture.mixture import Mixture, as_step, tempered
from owlfuse.data.mixture.schedule import MAX_PERIOD, chairman_order, exact_shares
from owlfuse.data.mixture.shuffle import PART, Shuffle
from single_draws import look_up, sample_at

few = settings(max_examples=25, deadline=None, derandomize=True)
names = list("abcdef")
weight = st.decimals(min_value="0.01", max_value=10, places=2).map(float)


@st.composite
def mixtures(draw, most=60):
    """Sizes and weights of 1 to 6 sources."""
    chosen = names[: draw(st.integers(1, 6))]
    return {n: draw(st.integers(1, most)) for n in chosen}, {n: draw(weight) for n in chosen}


def share(weights, name, left=None):
    left = left or set(weights)
    return (
        Fraction(str(weights[name])) / sum(Fraction(str(weights[n])) for n in left)
        if name in left
        else Fraction(0)
    )


def walk(mixture, stop):
    """What stands at the positions, one by one."""
    return [look_up(mixture, position) for position in range(stop)]


@few
@given(
    size=st.integers(1, 400),
    seed=st.integers(0, 2**63),
    source=st.integers(0, 50),
    epoch=st.integers(0, 2**20),
)
def test_an_epoch_is_a_permutation_and_parts_of_it_are_what_single_draws_give(
    size, seed, source, epoch
):
    shuffle = Shuffle(size, seed, source)
    whole = shuffle.between(epoch * size, (epoch + 2) * size)
    assert sorted(whole[:size]) == sorted(whole[size:]) == list(range(size))
    assert [sample_at(shuffle, epoch * size + i) for i in range(2 * size)] == whole.tolist()
    assert (
        shuffle.between(epoch * size + size // 2, (epoch + 1) * size).tolist()
        == whole[size // 2 : size].tolist()
    )


@pytest.mark.parametrize("size", [PART - 1, PART + 3, 10_000_000, 2**32 - 1])
def test_a_large_shuffle_is_reached_anywhere_without_an_array_of_its_size(size):
    shuffle = Shuffle(size, 3, 1)
    for start in (0, size - 700, 5 * size - 300, 10**6 * size + 17):
        part = shuffle.between(start, start + 800)
        assert part.tolist() == [sample_at(shuffle, start + i) for i in range(800)]
        assert part.min() >= 0
        assert part.max() < size
    if size < 10**8:
        assert np.array_equal(np.sort(shuffle.between(size, 2 * size)), np.arange(size))


@pytest.mark.slow
def test_a_shuffle_is_even_over_seeds_and_neighbours_are_not_kept():
    first = np.array([Shuffle(10, seed, 0).between(0, 10) for seed in range(4000)])
    counts = np.array([np.bincount(first[:, place], minlength=10) for place in range(10)])
    assert abs(counts - 400).max() < 100  # five deviations of a fair draw
    assert len({tuple(Shuffle(4, seed, 0).between(0, 4)) for seed in range(1000)}) == 24
    large = Shuffle(100_000, 0, 0).between(0, 100_000)
    assert (np.abs(np.diff(large)) == 1).mean() < 1e-3
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


@few
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=9))
def test_an_order_stays_within_tijdemans_bound_and_closes_its_period(counts):
    shares = exact_shares(counts)
    period = sum(counts)
    order = chairman_order(shares, period)
    drawn = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    assert drawn[-1].tolist() == counts
    bound = 1 - Fraction(1, 2 * len(counts) - 2)
    for position in range(period):
        for i, part in enumerate(shares):
            assert abs(int(drawn[position, i]) - part * (position + 1)) <= bound


@few
@given(
    case=mixtures(),
    seed=st.integers(0, 1000),
    start=st.integers(0, 10**12),
    length=st.integers(0, 200),
)
def test_positions_are_those_of_single_lookups_at_any_distance(case, seed, start, length):
    mixture = Mixture(*case, seed)
    sources, indices = mixture.positions(start, start + length)
    single = [look_up(mixture, position) for position in range(start, start + length)]
    assert [(mixture.names[s], i) for s, i in zip(sources, indices.tolist())] == single


@few
@given(case=mixtures(), steps=st.integers(1, 5))
def test_every_prefix_is_exact_and_every_epoch_covers_its_source(case, steps):
    sizes, weights = case
    mixture = Mixture(sizes, weights)
    drawn = {name: [] for name in sizes}
    for position, (name, index) in enumerate(walk(mixture, 400), 1):
        drawn[name].append(index)
        for other in sizes:
            assert abs(len(drawn[other]) - share(weights, other) * position) < 1
    assert mixture.counts(400) == {name: len(found) for name, found in drawn.items()}
    for name, size in sizes.items():
        for epoch in range(len(drawn[name]) // size):
            assert sorted(drawn[name][epoch * size : (epoch + 1) * size]) == list(range(size))


@few
@given(case=mixtures(40), data=st.data())
def test_a_source_that_is_drawn_once_drops_out_and_the_others_share_its_weight(case, data):
    sizes, weights = case
    ends = {name: data.draw(st.sampled_from(["repeat", "once"])) for name in sizes}
    mixture = Mixture(sizes, weights, at_end=ends)
    length = mixture.available(500)
    assert length == (sum(sizes.values()) if set(ends.values()) == {"once"} else 500)
    drawn, since, began = {name: [] for name in sizes}, dict.fromkeys(sizes, 0), 0
    left = set(sizes)
    for position, (name, index) in enumerate(walk(mixture, length), 1):
        drawn[name].append(index)
        since[name] += 1
        assert name in left
        for other in sizes:
            assert abs(since[other] - share(weights, other, left) * (position - began)) < 1
        if ends[name] == "once" and len(drawn[name]) == sizes[name]:
            assert sorted(drawn[name]) == list(range(sizes[name]))
            left, since, began = left - {name}, dict.fromkeys(sizes, 0), position
    if length < 500:
        with pytest.raises(IndexError, match=f"the schedule has {length:,} positions"):
            look_up(mixture, length)


@few
@given(case=mixtures(40), stopping=st.sampled_from(names))
def test_a_schedule_stops_after_the_last_sample_of_the_source_that_stops_it(case, stopping):
    sizes, weights = case
    assume(stopping in sizes)
    mixture = Mixture(sizes, weights, at_end={stopping: "stop"})
    length = mixture.available(10**9)
    schedule = walk(mixture, length)
    assert schedule[-1][0] == stopping
    assert sorted(index for name, index in schedule if name == stopping) == list(
        range(sizes[stopping])
    )
    assert schedule == walk(Mixture(sizes, weights), length)


@few
@given(
    case=mixtures(), starts=st.lists(st.integers(1, 300), max_size=3, unique=True), data=st.data()
)
def test_every_prefix_of_every_phase_is_exact_and_epochs_go_on_across_phases(case, starts, data):
    sizes, weights = case
    at = {
        start: {name: data.draw(st.one_of(st.just(0), weight)) for name in sizes}
        for start in starts
    }
    assume(all(any(phase.values()) for phase in at.values()))
    mixture = Mixture(sizes, weights, weights_at=at)
    drawn = {name: [] for name in sizes}
    phases = sorted({0: weights, **at}.items())
    for (start, phase), stop in zip(phases, [*(s for s, _ in phases[1:]), 400]):
        since = dict.fromkeys(sizes, 0)
        for position in range(start, stop):
            name, index = look_up(mixture, position)
            drawn[name].append(index)
            since[name] += 1
            for other in sizes:
                assert abs(since[other] - share(phase, other) * (position + 1 - start)) < 1
    for name, size in sizes.items():
        assert sorted(drawn[name][:size]) == list(range(size)) or len(drawn[name]) < size


@st.composite
def counted_mixtures(draw):
    """Supervised tokens of each sample of 1 to 5 sources, whose lengths differ up to a hundredfold,
    and how many epochs of each source to draw."""
    lengths, epochs = {}, {}
    for name in names[: draw(st.integers(1, 5))]:
        longest = draw(st.sampled_from([3, 30, 300]))
        counts = draw(st.lists(st.integers(0, longest), min_size=1, max_size=40))
        lengths[name] = np.array([*counts, longest])
        epochs[name] = draw(st.integers(1, 4))
    return lengths, epochs


def by_tokens(lengths, weights, seed=0, **options):
    sizes = {name: len(counts) for name, counts in lengths.items()}
    means = {name: Fraction(int(counts.sum()), len(counts)) for name, counts in lengths.items()}
    return Mixture(sizes, weights, seed, mean_tokens=means, **options)


def tokens_of(schedule, lengths):
    tokens = dict.fromkeys(lengths, 0)
    for name, index in schedule:
        tokens[name] += int(lengths[name][index])
    return tokens


@few
@given(case=counted_mixtures(), seed=st.integers(0, 1000))
def test_by_tokens_whole_epochs_hold_exactly_the_shares_and_every_prefix_those_of_samples(
    case, seed
):
    lengths, epochs = case
    weights = {name: epochs[name] * int(counts.sum()) for name, counts in lengths.items()}
    mixture = by_tokens(lengths, weights, seed)
    draws = {name: epochs[name] * len(counts) for name, counts in lengths.items()}
    total = sum(draws.values())
    schedule = walk(mixture, total)
    assert tokens_of(schedule, lengths) == weights
    drawn = dict.fromkeys(lengths, 0)
    for position, (name, _) in enumerate(schedule, 1):
        drawn[name] += 1
        for source, count in draws.items():
            assert abs(drawn[source] - Fraction(count, total) * position) < 1
    asked = mixture.asked_shares(total)
    for name, weight in weights.items():
        assert asked[name] == pytest.approx(weight / sum(weights.values()), abs=2 / MAX_PERIOD)


@pytest.mark.parametrize(("asked", "scale"), [(0.6, 300), (0.9, 300), (0.2, 40)])
def test_by_tokens_sources_of_very_different_lengths_have_the_asked_share_after_an_epoch_of_one(
    asked, scale
):
    generator = np.random.default_rng(0)
    lengths = {
        "small": generator.integers(1, scale, 40),
        "large": generator.integers(1, 12, 20_000),
    }
    mixture = by_tokens(lengths, {"small": asked, "large": round(1 - asked, 1)})
    means = {name: counts.mean() for name, counts in lengths.items()}
    drawn, position = 0, 0
    while drawn < 40:
        drawn += look_up(mixture, position)[0] == "small"
        position += 1
    counts = mixture.counts(position)
    ratio = (asked / means["small"]) / (asked / means["small"] + (1 - asked) / means["large"])
    assert abs(counts["small"] - ratio * position) < 1
    tokens = tokens_of(walk(mixture, position), lengths)
    # An epoch of the small source has exactly its tokens. The other's are a part of its epoch: as
    # many samples as they must be, but not all of them.
    assert tokens["small"] == lengths["small"].sum()
    assert abs(counts["large"] * means["large"] - tokens["small"] * (1 - asked) / asked) <= (
        means["small"] / asked
    )
    assert tokens["small"] / sum(tokens.values()) == pytest.approx(asked, abs=0.015)


@few
@given(case=mixtures(), mean=st.fractions(min_value=Fraction(1, 9), max_value=900), data=st.data())
def test_by_tokens_sources_of_one_mean_length_are_drawn_as_by_samples(case, mean, data):
    sizes, weights = case
    ends = {name: data.draw(st.sampled_from(["repeat", "once", "stop"])) for name in sizes}
    options = {"weights_at": {70: dict.fromkeys(sizes, 1)}, "at_end": ends}
    mixture = Mixture(sizes, weights, **options, mean_tokens=dict.fromkeys(sizes, mean))
    expected = Mixture(sizes, weights, **options)
    assert mixture.sample_phases == expected.sample_phases == expected.phases
    length = expected.available(500)
    assert mixture.available(500) == length
    assert walk(mixture, length) == walk(expected, length)


@settings(few, max_examples=5)  # a period of 2^20 takes up to a second
@given(case=counted_mixtures(), data=st.data())
def test_by_tokens_phases_and_ends_are_those_of_the_divided_weights(case, data):
    lengths, _ = case
    weights = {name: data.draw(weight) for name in lengths}
    later = {name: data.draw(weight) for name in list(lengths)[:1]}
    ends = {name: data.draw(st.sampled_from(["repeat", "once", "stop"])) for name in lengths}
    mixture = by_tokens(lengths, weights, weights_at={70: later}, at_end=ends)

    def divided(shares):
        return {
            name: Fraction(str(share)) * len(lengths[name]) / int(lengths[name].sum())
            for name, share in shares.items()
        }

    sizes = {name: len(counts) for name, counts in lengths.items()}
    expected = Mixture(sizes, divided(weights), weights_at={70: divided(later)}, at_end=ends)
    length = expected.available(400)
    assert mixture.available(400) == length
    assert walk(mixture, length) == walk(expected, length)


def test_asked_shares_of_tokens_count_a_phase_by_its_tokens():
    lengths = {"a": np.full(10, 90), "b": np.full(10, 10)}
    mixture = by_tokens(lengths, {"a": 0.5, "b": 0.5}, weights_at={100: {"a": 0}})
    # In the first phase a tenth of the samples are of `a`: 18 tokens a sample; then 10.
    assert mixture.counts(100) == {"a": 10, "b": 90}
    assert mixture.asked_shares(100) == pytest.approx({"a": 0.5, "b": 0.5})
    assert mixture.asked_shares(190)["a"] == pytest.approx(0.5 * 1800 / 2700)
    by_samples = Mixture({"a": 10, "b": 10}, {"a": 1, "b": 3}, weights_at={100: {"a": 0}})
    assert by_samples.asked_shares(200)["a"] == pytest.approx(0.125)


@few
@given(
    case=mixtures(),
    ranks=st.sampled_from([1, 2, 3, 4]),
    accumulation=st.integers(1, 3),
    micro=st.integers(1, 4),
    first=st.integers(0, 3),
)
def test_ranks_and_accumulation_share_out_each_global_batch(
    case, ranks, accumulation, micro, first
):
    size = ranks * accumulation * micro
    mixture = Mixture(*case)
    parts = [
        list(GlobalBatchSampler(size, accumulation, rank, ranks, 5, first)) for rank in range(ranks)
    ]
    for step in range(first, 5):
        at = (step - first) * accumulation
        positions = sorted(
            p for part in parts for batch in part[at : at + accumulation] for p in batch
        )
        assert positions == list(range(step * size, (step + 1) * size))
        assert all(look_up(mixture, p) == look_up(Mixture(*case), p) for p in positions[:2])


@pytest.mark.parametrize("temperature", [1e-9, 0.01, 1e9])
def test_an_extreme_temperature_neither_fails_nor_takes_a_source_out(temperature):
    sizes = {"a": 10**7, "b": 3, "c": 1}
    mixture = Mixture(sizes, tempered(sizes, dict.fromkeys(sizes, 1), temperature))
    assert mixture.names == ["a", "b", "c"]
    shares = mixture.phases[0][1]
    if temperature < 1:
        assert shares["a"] == 1 - Fraction(2, MAX_PERIOD)
    else:
        assert shares["a"] == shares["b"] + Fraction(1, MAX_PERIOD)


@pytest.mark.parametrize("temperature", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ({"a": 3, "b": 0}, {"a": 1, "b": 1}, "source b has weight 1 and no sample"),
        ({"a": 3, "b": 2}, {"a": 1, "b": float("nan")}, "source b has weight nan, expected"),
        ({}, {}, r"the weights of all sources \(none\) are 0"),
    ],
)
def test_a_temperature_hides_no_weight_that_makes_no_mixture(temperature, sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, tempered(sizes, weights, temperature))


def test_a_temperature_goes_from_the_sizes_to_even_shares():
    sizes, weights = {"a": 900, "b": 100, "off": 7}, {"a": 1.0, "b": 1.0, "off": 0}
    assert Mixture(sizes, tempered(sizes, weights, 1)).counts(1000) == {"a": 900, "b": 100}
    assert Mixture(sizes, tempered(sizes, weights, 2)).counts(1000) == {"a": 750, "b": 250}
    assert Mixture(sizes, tempered(sizes, weights, float("inf"))).counts(1000) == {
        "a": 500,
        "b": 500,
    }
    with pytest.raises(ValueError, match="temperature is 0"):
        tempered(sizes, weights, 0)


def test_the_longest_period_is_exact_at_its_end():
    weights = {"a": 0.123456789123, "b": 1 / 3, "c": 0.7654321987}
    mixture = Mixture({"a": 5, "b": 6, "c": 7}, weights)
    for position in (10**3, 10**5, MAX_PERIOD):
        for name, counted in mixture.counts(position).items():
            assert abs(counted - share(weights, name) * position) < 1.5
    assert look_up(mixture, 10**15) == look_up(mixture, 10**15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_end": "twice"}, "at_end of source a is twice, expected repeat, stop, once"),
        ({"at_end": {"z": "once"}}, "at_end names z, which is no source; they are a, b"),
        ({"weights_at": {5: {"z": 1}}}, "weights_at 5 names z, which is no source; they are a, b"),
        ({"weights_at": {5: {"a": 0, "b": 0}}}, r"the weights of all sources \(a, b\) are 0"),
        ({"weights_at": {-5: {"a": 1}}}, "weights_at -5: expected a position from 0 on"),
        (
            {"mean_tokens": {"a": Fraction(1), "b": Fraction(0)}},
            "source b has weight 1 and no supervised token",
        ),
    ],
)
def test_what_makes_no_schedule_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": 3, "b": 2}, {"a": 1, "b": 1}, **options)


@pytest.mark.parametrize("key", ["²", "-1", True])
def test_a_step_is_written_in_decimal_digits(key):
    with pytest.raises(ValueError, match="expected an optimizer step from 0 on"):
        as_step(key)
