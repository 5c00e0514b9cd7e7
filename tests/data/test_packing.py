"""Packing: nothing lost, nothing twice, nothing over the length, and the padding that it saves."""

import dataclasses
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from test_datamodule import batches, make

from owlfuse.core.errors import DataError
from owlfuse.core.types import Encoded, Skipped
from owlfuse.data.collate import Collator
from owlfuse.data.packing import Padding, best_fit, check_pack_to, join, least_padding, positions


def samples(lengths, images=0):
    """Samples of those lengths, ids and pictures all different, images at their first positions."""
    made, token = [], 1
    for k, length in enumerate(lengths):
        ids = torch.arange(token, token + length)
        token += length
        count = min(images, length)
        placeholder = torch.arange(length) < count
        pictures = [torch.full((3, 2, 2), 100.0 * k + i) for i in range(count)]
        made.append(
            Encoded(f"s{k}", "source", ids, ids.clone(), placeholder, pictures, list(range(count)))
        )
    return made


def slow_best_fit(lengths, capacity):
    """Every row looked at for every item."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + lengths[index] <= capacity]
        if fitting:
            min(fitting, key=lambda row: capacity - sum(lengths[i] for i in row)).append(index)
        else:
            rows.append([index])
    return sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("seed", range(40))
def test_every_item_is_in_exactly_one_row_and_no_row_is_too_long(seed):
    chance = random.Random(seed)
    capacity = chance.choice([1, 7, 100, 4096])
    lengths = [chance.randint(1, capacity) for _ in range(chance.choice([0, 1, 2, 30, 200]))]
    rows = best_fit(lengths, capacity)
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == best_fit(lengths, capacity)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    full = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(a + b > capacity for a, b in pairwise(full))  # two rows that fit into one are one


@pytest.mark.parametrize("seed", range(10))
def test_it_is_the_best_fit_of_each_item_from_the_longest_on(seed):
    chance = random.Random(seed)
    # all different, so that ties decide nothing but between equal spaces
    lengths = chance.sample(range(1, 60), 40)
    assert sum(map(len, best_fit(lengths, 64))) == 40
    assert len(best_fit(lengths, 64)) == len(slow_best_fit(lengths, 64))
    assert best_fit(lengths, 64) == slow_best_fit(lengths, 64)


def test_the_tightest_row_is_taken_and_not_the_first():
    assert best_fit([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]
    assert best_fit([5, 8, 2], 10) == [[0], [1, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_packed_rows_never_hold_more_padding_than_unpacked_ones_or_than_rows_of_the_full_length(
    seed,
):
    chance = random.Random(seed)
    lengths = [chance.randint(40, 80) for _ in range(chance.choice([1, 3, 8, 32]))]
    rows = least_padding(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 256 for row in rows)
    assert positions(rows, lengths) <= len(lengths) * max(lengths)
    assert positions(rows, lengths) <= positions(best_fit(lengths, 256), lengths)
    assert rows == least_padding(lengths, 256)


def test_rows_are_as_long_as_leaves_no_row_half_empty():
    assert positions(best_fit([10] * 3, 20), [10] * 3) == 40
    assert least_padding([10] * 3, 20) == [[0], [1], [2]]
    # no padding either way: as few rows as may be
    assert least_padding([10] * 4, 20) == [[0, 1], [2, 3]]
    assert least_padding([], 20) == []
    with pytest.raises(ValueError, match="item 0 is 21 long"):
        least_padding([21], 20)


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="item 1 is 11 long, and a row holds 10"):
        best_fit([3, 11], 10)
    with pytest.raises(DataError, match="sample s1 is 11 tokens long, over pack_to of 10"):
        Collator(0, (3, 2, 2), pack_to=10)(samples([3, 11]))


def test_a_row_that_could_not_hold_the_longest_sample_is_refused_before_anything_is_read(shapes):
    assert check_pack_to(None, 512) is None
    assert check_pack_to(512, 512) == 512
    with pytest.raises(
        ValueError, match="pack_to is 256 and max_length 512: a row must hold the longest sample"
    ):
        make(shapes, max_length=512, pack_to=256)


@pytest.mark.parametrize("seed", range(20))
def test_the_tokens_labels_and_pictures_of_a_packed_batch_are_those_of_its_samples(seed):
    chance = random.Random(seed)
    given = samples([chance.randint(1, 20) for _ in range(chance.randint(1, 30))], images=seed % 3)
    batch = Collator(0, (3, 2, 2), pack_to=24)(given)
    by_id = {sample.id: sample for sample in given}
    assert sorted(batch.ids) == sorted(by_id)
    assert batch.lengths == [len(by_id[i].input_ids) for i in batch.ids]
    names, pictures = iter(batch.ids), 0
    for b, segments in enumerate(batch.segment_ids):
        assert torch.equal(segments > 0, batch.attention_mask[b] == 1)
        assert segments[segments > 0].diff().min().item() >= 0 if (segments > 0).sum() > 1 else True
        assert not (segments[:-1] == 0)[segments[1:] > 0].any()  # padding on the right alone
        images = 0
        for k in range(1, int(segments.max()) + 1):
            sample = by_id[next(names)]
            here = segments == k
            first = int(here.nonzero()[0])
            assert torch.equal(batch.input_ids[b][here], sample.input_ids)
            assert torch.equal(batch.placeholder[b][here], sample.placeholder)
            assert batch.labels[b][here].tolist() == [-100, *sample.labels[1:].tolist()]
            for position, picture in zip(sample.image_positions, sample.pixel_values, strict=True):
                assert batch.image_positions[b, images] == first + position
                assert torch.equal(batch.pixel_values[batch.image_index[b, images]], picture)
                images += 1
        pictures += images
        assert (batch.image_index[b, images:] == -1).all()
        assert (batch.image_positions[b, images:] == batch.input_ids.shape[1]).all()
    assert next(names, None) is None
    assert pictures == (len(batch.pixel_values) if batch.has_images else 0)


def test_joining_knows_every_field_of_a_sample():
    """A new field of `Encoded` wants a line in `join`, which would leave it out otherwise."""
    known = {
        "id",
        "source",
        "input_ids",
        "labels",
        "placeholder",
        "pixel_values",
        "image_positions",
        "turns_removed",
        "notes",
    }
    assert {field.name for field in dataclasses.fields(Encoded)} == known


def test_a_sample_is_as_it_was_after_it_was_packed():
    (sample,) = samples([5], images=1)
    joined, segments = join([sample, sample])
    assert sample.labels.tolist() == [1, 2, 3, 4, 5]
    assert sample.image_positions == [0]
    assert joined.image_positions == [0, 5]
    assert segments.tolist() == [1] * 5 + [2] * 5


def test_skipped_samples_are_told_with_a_packed_batch_too():
    batch = Collator(0, (3, 2, 2), pack_to=9)([*samples([4, 5]), Skipped("a", "a:1", "broken")])
    assert batch.ids == ["s0", "s1"]
    assert batch.skipped == [("a", "a:1", "broken")]


def test_padding_is_counted_as_it_is_and_as_it_would_be_unpacked():
    padding = Padding()
    for lengths in ([10, 2, 3, 5], [6, 1]):
        padding.add(Collator(0, (3, 2, 2), pack_to=10)(samples(lengths)))
    # packed: [10] and [5, 3, 2], then [6, 1]; unpacked: 4 rows of 10 and 2 of 6
    assert (padding.tokens, padding.positions, padding.unpacked) == (27, 27, 52)
    assert padding.shares() == {"padding": 0, "padding_unpacked": 1 - 27 / 52}
    unpacked = Padding()
    unpacked.add(Collator(0, (3, 2, 2))(samples([10, 2, 3, 5])))
    assert unpacked.shares() == {"padding": 0.5, "padding_unpacked": 0.5}


@pytest.mark.parametrize("pack_to", [None, 10])
def test_a_batch_of_which_all_is_skipped_is_padding(pack_to):
    padding = Padding()
    padding.add(Collator(0, (3, 2, 2), pack_to=pack_to)([Skipped("a", "a:1", "no image")]))
    assert padding.shares() == {"padding": 1, "padding_unpacked": 1}


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (2, None), (2, 2), (1, 4)])
def test_a_packed_global_batch_holds_each_sample_once_and_no_other_batchs(shapes, ranks, micro):
    expected = [sorted(batch.ids) for batch in batches(make(shapes))]
    data = make(shapes, micro_batch_size=micro, pack_to=2048)
    parts = [batches(data, rank, ranks) for rank in range(ranks)]
    each = data.accumulation(ranks)
    for step, ids in enumerate(expected):
        seen = [batch for part in parts for batch in part[step * each : (step + 1) * each]]
        assert sorted(i for batch in seen for i in batch.ids) == ids
        assert all(len(batch.input_ids) == 1 for batch in seen)  # these chats are short


def test_workers_and_a_resume_do_not_change_packed_batches(shapes):
    whole = batches(make(shapes, max_length=128, pack_to=128))
    others = batches(make(shapes, max_length=128, pack_to=128, workers=2), first=2)
    assert any(len(batch.input_ids) < len(batch.ids) for batch in whole)
    for one, other in zip(whole[2:], others, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.segment_ids, other.segment_ids)


def test_validation_and_prompts_are_not_packed(shapes):
    data = make(shapes, pack_to=2048)
    batch = next(iter(data.validation_loader("val")))
    assert batch.segment_ids is None
    assert len(batch.input_ids) == len(batch.ids)
