"""A sample of questions has every kind in proportion, spread over the pictures, whatever the
order of the file."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlfuse.core.types import Sample
from owlfuse.data.subset import stratified_sample
from owlfuse.evaluation.benchmarks.base import Question, spread
from owlfuse.evaluation.metrics import counts_of, sample_questions, score

KINDS = ["color", "shape", "count", "position", "size", "presence"]


def questions(pictures, kinds=KINDS, named=True):
    """As many questions of each picture as there are kinds, always in the same order."""
    return [
        (
            Sample(f"val:{picture}#{number}", "val", [], [f"{picture}.png"]),
            "yes",
            kind if named else "",
        )
        for picture in range(pictures)
        for number, kind in enumerate(kinds)
    ]


def number_of(question):
    return int(question[0].id.partition("#")[2])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("limit", [6, 20, 60, 600, 2399])
def test_each_kind_is_asked_in_proportion_whatever_its_place_in_the_chats(limit, named):
    """Six questions a picture, of which every (n / limit)-th were all of the first kind.

    Without names the places count.
    """
    asked = sample_questions(questions(400, named=named), limit)
    counts = Counter(map(number_of, asked))
    assert len(asked) == len({question[0].id for question in asked}) == limit
    assert max(counts.values()) - min(counts[number] for number in range(6)) <= 1
    pictures = Counter(question[0].images[0] for question in asked)
    assert len(pictures) == min(limit, 400)
    assert max(pictures.values()) - min(pictures.values() if limit >= 400 else [1]) <= 1


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 6)), min_size=1, max_size=80),
    st.integers(1, 90),
)
def test_the_share_of_each_kind_is_within_one_of_its_share_of_all(items, limit):
    kinds, pictures = [kind for kind, _ in items], [picture for _, picture in items]
    chosen = stratified_sample(kinds, pictures, limit)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(limit, len(items))
    all_kinds, mine = Counter(kinds), Counter(kinds[index] for index in chosen)
    for kind, count in all_kinds.items():
        assert mine[kind] <= count
        if limit >= len(all_kinds):
            assert mine[kind] >= 1
        # to one of a small kind
        raised = sum(size * limit < len(items) for size in all_kinds.values())
        assert abs(mine[kind] - count * min(limit, len(items)) / len(items)) <= 1 + raised
    assert stratified_sample(kinds, pictures, limit) == chosen


def test_no_limit_and_a_limit_above_all_ask_everything_in_order():
    everything = questions(3)
    assert (
        sample_questions(everything, None)
        == sample_questions(everything, 18)
        == sample_questions(everything, 99)
        == everything
    )


def test_the_counts_say_what_was_asked_of_what():
    everything = questions(10)
    counts = counts_of(everything, sample_questions(everything, 12))
    assert (counts["asked"], counts["of"]) == (12, 60)
    assert counts["kinds"] == {kind: {"asked": 2, "of": 10} for kind in sorted(KINDS)}


def test_what_was_not_measured_has_no_figure():
    assert score([], [], None) == {}
    assert set(score([], None, 1.0)) == {"loss", "perplexity"}


@pytest.mark.parametrize("limit", [3, 4, 30])
def test_a_benchmark_is_sampled_by_its_groups_and_a_unit_stays_whole(limit):
    """Groups take turns in the file, and the four rotations of a question are one unit."""
    asked = [
        Question(
            f"{number}-{rotation}",
            [],
            [f"{number // 3}.png"],
            "A",
            group=f"group {number % 3}",
            unit=str(number),
        )
        for number in range(300)
        for rotation in range(4)
    ]
    kept = spread(asked, limit)
    units = Counter(question.unit for question in kept)
    assert len(units) == limit
    assert set(units.values()) == {4}
    groups = Counter(int(unit) % 3 for unit in units)
    assert max(groups.values()) - min(groups[group] for group in range(3)) <= 1
    assert spread(asked, None) == spread(asked, 300) == asked


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_asks_nothing_is_refused(limit):
    from owlfuse.evaluation.validation import Evaluation

    with pytest.raises(
        ValueError, match="evaluation.max_questions is .* expected at least 1, or null for all"
    ):
        Evaluation(max_questions=limit)


def test_validation_during_training_is_no_run_of_one_kind():
    """A file in order of its kinds: the first samples would all be of one."""
    from owlfuse.data.datamodule import ChatData

    source = [f"sample {index}" for index in range(400)]
    data = SimpleNamespace(
        validation={"val": source}, load=None, loader=lambda dataset, **options: dataset
    )
    indices = ChatData.validation_loader(data, "val", 40).indices
    assert len(indices) == len(set(indices)) == 40
    assert list(indices) == sorted(indices)
    assert all(
        sum(low <= index < low + 100 for index in indices) >= 2 for low in (0, 100, 200, 300)
    )
    assert list(ChatData.validation_loader(data, "val", None).indices) == list(range(400))
