"""The schedule is exact in every prefix, has no state, and covers each source once a pass."""

from fractions import Fraction

import pytest

from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.mixture.schedule import MAX_PERIOD, exact_shares
from single_draws import look_up

MIXTURES = [
    {"a": 1.0},
    {"a": 0.5, "b": 0.5},
    {"a": 0.7, "b": 0.3},
    {"a": 242, "b": 150},
    {
        "a": 0.3522,
        "b": 0.2607,
        "c": 0.1447,
        "d": 0.096,
        "e": 0.0773,
        "f": 0.0564,
        "g": 0.0081,
        "h": 0.0046,
    },
    {"a": 1, "b": 0, "c": 2},
    {"a": 1e-3, "b": 1},
]


def sizes_of(weights):
    return {name: 3 + 7 * i for i, name in enumerate(weights)}


@pytest.mark.parametrize("weights", MIXTURES)
def test_every_prefix_holds_each_source_within_one_sample_of_its_weight(weights):
    mixture = Mixture(sizes_of(weights), weights)
    total = sum(Fraction(str(w)) for w in weights.values())
    drawn = dict.fromkeys(weights, 0)
    for position in range(2500):
        drawn[look_up(mixture, position)[0]] += 1
        for name, weight in weights.items():
            assert abs(drawn[name] - Fraction(str(weight)) / total * (position + 1)) < 1


@pytest.mark.parametrize("weights", MIXTURES)
def test_the_counts_of_a_prefix_are_those_of_its_positions(weights):
    mixture = Mixture(sizes_of(weights), weights)
    drawn = [look_up(mixture, position)[0] for position in range(1000)]
    for length in (0, 1, 17, 999, 1000):
        assert mixture.counts(length) == {
            name: drawn[:length].count(name) for name in weights if weights[name]
        }


def test_a_position_does_not_depend_on_what_was_asked_before():
    weights = {"a": 0.6, "b": 0.4}
    walked = Mixture(sizes_of(weights), weights, seed=3)
    schedule = [look_up(walked, position) for position in range(400)]
    fresh = Mixture(sizes_of(weights), weights, seed=3)
    assert [look_up(fresh, position) for position in reversed(range(400))] == schedule[::-1]


def test_each_pass_covers_every_sample_once_and_is_shuffled_anew():
    mixture = Mixture({"a": 50, "b": 20}, {"a": 0.5, "b": 0.5})
    drawn = [index for name, index in (look_up(mixture, p) for p in range(400)) if name == "a"]
    passes = [drawn[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_another_seed_is_another_order():
    weights = {"a": 1.0, "b": 1.0}
    sizes = {"a": 100, "b": 100}
    first, second = (
        [look_up(Mixture(sizes, weights, seed), p) for p in range(60)] for seed in (0, 1)
    )
    assert first != second


def test_weights_too_fine_for_a_period_are_rounded_and_add_up_to_one():
    shares = exact_shares([0.123456789123, 1 / 3, 0.7654321987])
    assert sum(shares) == 1
    assert all(MAX_PERIOD % share.denominator == 0 for share in shares)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ({"a": 1}, {"a": float("nan")}, "source a has weight nan"),
        ({"a": 1}, {"a": -0.5}, "source a has weight -0.5"),
        ({"a": 1, "b": 1}, {"a": 0, "b": 0}, r"the weights of all sources \(a, b\) are 0"),
        ({"a": 0}, {"a": 1}, "source a has weight 1 and no sample"),
        ({}, {}, "are 0"),
    ],
)
def test_weights_that_make_no_mixture_are_named(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, weights)
