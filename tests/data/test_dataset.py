"""Micro batches are looked up in blocks, and are what single positions give."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from owlfuse.data import loading as module
from owlfuse.data.loading import GlobalBatchSampler, MixtureDataset
from owlfuse.data.mixture.mixture import Mixture
from single_draws import look_up

SIZES, WEIGHTS = {"a": 50, "b": 7, "c": 90}, {"a": 0.5, "b": 0.2, "c": 0.3}


def load(sample, source):
    return source, sample


class Numbers(list):
    """A source whose samples are their own numbers."""

    def __init__(self, name, size):
        super().__init__(range(size))
        self.name = name


def dataset(mixture):
    return MixtureDataset(
        mixture, {name: Numbers(name, size) for name, size in SIZES.items()}, load
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    starts=st.lists(st.integers(0, 10**6), min_size=1, max_size=6),
    count=st.integers(1, 70),
    ahead=st.sampled_from([(1, 1), (8, 64), (64, 64)]),
)
def test_whatever_is_asked_in_whatever_order_is_what_single_positions_give(starts, count, ahead):
    mixture = Mixture(SIZES, WEIGHTS, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FIRST_BLOCK", ahead[0])
        patch.setattr(module, "BLOCK", ahead[1])
        drawn = dataset(mixture)
        for start in [*starts, starts[0] + 5]:
            positions = range(start, start + count)
            assert drawn.draws(positions) == [look_up(mixture, position) for position in positions]
            assert drawn.draws(positions[::-3]) == [
                look_up(mixture, position) for position in positions[::-3]
            ]


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_asks_for_whole_micro_batches(workers):
    mixture = Mixture(SIZES, WEIGHTS, 3)
    expected = [
        [look_up(mixture, position) for position in range(start, start + 4)]
        for start in range(0, 400, 8)
    ]
    sampler = GlobalBatchSampler(8, 1, 0, 2, steps=50)
    loader = DataLoader(
        dataset(mixture), batch_sampler=sampler, collate_fn=list, num_workers=workers
    )
    assert [[(source.name, sample) for source, sample in batch] for batch in loader] == expected


def test_a_schedules_last_samples_are_reached_and_what_lies_behind_is_an_error():
    mixture = Mixture(SIZES, WEIGHTS, at_end="once")
    drawn = dataset(mixture)
    assert drawn.draws(range(140, 147)) == [
        look_up(mixture, position) for position in range(140, 147)
    ]
    with pytest.raises(IndexError, match="the schedule has 147 positions"):
        drawn.draws(range(140, 148))
