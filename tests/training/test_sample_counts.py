"""What was skipped and truncated is counted over the whole run, resumes included."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from helpers import IMAGE_SIZE, ROWS, VOCAB, all_fusions, each, make_batch, model_node
from owlfuse.core.errors import DataError
from owlfuse.core.types import Note, Skipped
from owlfuse.data.collate import Collator
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.training import sample_counts
from owlfuse.training.module import MultimodalModule
from owlfuse.training.sample_counts import SampleTotals, over_ranks


class SourceOf(SimpleNamespace):
    """A source of so many samples."""

    def __len__(self):
        return self.size


@pytest.fixture
def module():
    def make(max_skips=100, fusion="concat", size=1000):
        made = MultimodalModule(model_node(fusion), None, VOCAB)
        sources = {name: SourceOf(max_skips=max_skips, size=size) for name in "ab"}
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
        made._trainer = SimpleNamespace(
            callbacks=[],
            datamodule=SimpleNamespace(sources=sources, step_positions=StepPositions.of(8)),
            accumulate_grad_batches=2,
            precision="32-true",
            world_size=1,
            global_rank=0,
            strategy=strategy,
            is_global_zero=True,
            global_step=0,
            log_every_n_steps=10,
            default_root_dir=".",
        )
        made.log = made.log_dict = lambda *args, **kwargs: None
        made.configure_model()
        return made

    return make


def train(module, *micro_batches, whole=True):
    """Micro batches with such skips and cuts, and the optimizer's step after them where it is
    whole."""
    for skipped, truncated in micro_batches:
        batch = make_batch(ROWS)
        batch.skipped, batch.truncated = skipped, truncated
        batch.notes = [("a", "a:1", Note("unused", "a record's 'topic'"), 3)]
        module.training_step(batch, 0).backward()
    if whole:
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))


def checkpoint_of(module, step):
    checkpoint = {
        "global_step": step,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {"current": {}, "total": {}}}},
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def skip(source, number):
    return source, f"{source}:{number}", "no image"


def test_a_resumed_run_goes_on_counting_from_the_last_whole_step(module, tmp_path):
    first = module()
    train(first, ([skip("a", 1)], []), ([skip("b", 2)], [("a", "a:7", 1)]))
    train(first, ([skip("a", 3)], [("a", "a:8", 2)]), whole=False)  # its step is run again
    assert len(first.samples.skipped) == 3
    torch.save(checkpoint_of(first, 1), tmp_path / "last.ckpt")
    second = module()
    second.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert second.samples.skipped == Counter([skip("a", 1), skip("b", 2)])
    assert second.samples.truncated == {"a": 1}
    # two micro batches of a whole step
    assert second.samples.notes.counts == {("a", "not used: a record's 'topic'"): 6}
    assert (
        second.samples.total_padding.counts() == first.samples.total_padding.counts() != (0, 0, 0)
    )
    once = first.samples.total_padding.counts()
    train(second, ([skip("a", 3)], [("a", "a:8", 2)]), ([], []))
    assert second.samples.skipped == Counter([skip("a", 1), skip("b", 2), skip("a", 3)])
    assert second.samples.truncated == {"a": 2}
    assert over_ranks(second.trainer, second.samples.totals()).notes == {
        ("a", "not used: a record's 'topic'"): 12
    }
    assert second.samples.total_padding.counts() == tuple(2 * count for count in once)


def test_the_limit_of_skips_holds_over_a_resume(module):
    first = module(max_skips=2)
    train(first, ([skip("a", 1), skip("a", 2), skip("b", 1)], []), ([], []))
    second = module(max_skips=2)
    second.on_load_checkpoint(checkpoint_of(first, 1))
    with pytest.raises(
        DataError, match="source a had 3 wrong samples, over its max_skips of 2; the last: no image"
    ):
        train(second, ([skip("a", 3)], []))


def test_a_checkpoint_from_before_skips_were_kept_is_read(module):
    made = module()
    checkpoint = checkpoint_of(made, 1)
    del checkpoint["skipped"], checkpoint["truncated"], checkpoint["notes"], checkpoint["padded"]
    made.on_load_checkpoint(checkpoint)
    assert (made.samples.skipped, made.samples.truncated, made.samples.total_padding.counts()) == (
        Counter(),
        {},
        (0, 0, 0),
    )


def test_every_skip_and_cut_goes_to_the_log(module, caplog):
    with caplog.at_level("INFO"):
        train(module(), ([skip("a", 1)], [("b", "b:7", 2)]), ([], []))
    assert "skipped a:1 (1 of source a so far): no image" in caplog.text
    assert "truncated b:7 by 2 turns (1 of source b so far)" in caplog.text


@each(all_fusions())
def test_a_micro_batch_of_which_nothing_is_left_adds_nothing_and_misses_no_gradient(module, node):
    made = module(fusion=node)
    batch = Collator(0, (3, IMAGE_SIZE, IMAGE_SIZE))(
        [Skipped("a", "a:1", "no image"), Skipped("b", "b:1", "no image")]
    )
    loss = made.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0
    assert (made.loss_sum, made.token_count) == (0, 0)
    for name, parameter in made.model.named_parameters():
        assert not parameter.requires_grad or (
            parameter.grad is not None and not parameter.grad.any()
        ), name


@pytest.mark.parametrize("passes", [1, 3, 9])
@pytest.mark.fast_cases(1)
def test_a_wrong_sample_counts_once_however_often_it_is_drawn_and_over_resumes(module, passes):
    made = module(max_skips=2)
    for _ in range(passes):
        train(made, ([skip("a", 1), skip("a", 2)], []), ([], []))
        again = module(max_skips=2)
        again.on_load_checkpoint(checkpoint_of(made, 1))
        made = again
    assert made.samples.skipped == Counter({skip("a", 1): passes, skip("a", 2): passes})
    with pytest.raises(DataError, match="source a had 3 wrong samples, over its max_skips of 2"):
        train(made, ([skip("a", 3)], []))


def test_skips_of_a_checkpoint_that_has_a_row_for_each_time_are_counted(module):
    made = module(max_skips=1)
    checkpoint = checkpoint_of(made, 1)
    checkpoint["skipped"] = [skip("a", 1), skip("a", 1)]
    made.on_load_checkpoint(checkpoint)
    assert made.samples.skipped == Counter({skip("a", 1): 2})


def test_a_source_of_which_no_sample_is_left_ends_the_run(module):
    made = module(size=2)
    train(made, ([skip("a", 1), skip("a", 1), skip("b", 1)], []), ([], []))
    with pytest.raises(DataError, match="all 2 samples of source a are wrong; the last: no image"):
        train(made, ([skip("a", 2)], []))


@pytest.mark.parametrize("size", [1000, 3])
@pytest.mark.parametrize(("ranks", "raises"), [([[1, 2], [1, 2]], False), ([[1, 2], [2, 3]], True)])
def test_a_sample_that_two_ranks_met_counts_once(module, monkeypatch, ranks, raises, size):
    made = module(max_skips=2 if size > 3 else 3, size=size)
    totals = [SampleTotals(Counter(skip("a", number) for number in numbers)) for numbers in ranks]
    monkeypatch.setattr(sample_counts, "all_gather_objects", lambda trainer, value: totals)
    rows = torch.tensor([[0, 0, 0, 0, 2, 0], [0, 0, 0, 0, 2, 0]])
    if raises:
        over = "source a had 3 wrong samples on all ranks together, over its max_skips of 2"
        with pytest.raises(DataError, match=over if size > 3 else "all 3 samples of source a are"):
            made.samples.check_ranks(made.trainer, rows)
    else:
        made.samples.check_ranks(made.trainer, rows)
