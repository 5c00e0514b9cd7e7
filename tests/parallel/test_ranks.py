"""Batches are dealt out to ranks: every rank gets all results in order, errors end all of them, and
a flag goes up everywhere at the same step."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from lightning.pytorch.strategies import FSDPStrategy

from owlfuse.core.errors import DataError
from owlfuse.data.loading import batches_of_rank
from owlfuse.parallel.collectives import SharedFlag
from owlfuse.parallel.ranks import Ranks
from owlfuse.parallel.strategies import (
    Replicated,
    Sharded,
    check_strategy,
    rank_timeouts_as_data_errors,
    strategy_timeout,
)

RANKS = 2
BATCHES = ["a", "b", "c"]
"""A number that two ranks do not divide."""


class Trainer:
    """What `SharedFlag` asks of a trainer."""

    strategy = None

    def __init__(self, world_size):
        self.world_size = world_size


@pytest.mark.parametrize("samples", [0, 1, 7, 8, 9, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_have_the_batches_of_one_process(samples, ranks):
    whole = batches_of_rank(samples, 4, 0, 1)
    assert [number for batch in whole for number in batch] == list(range(samples))
    shares = [batches_of_rank(samples, 4, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    in_turn = [batch for of_round in zip(*shares, strict=True) for batch in of_round]
    assert in_turn[: len(whole)] == whole
    assert all(len(batch) == 0 for batch in in_turn[len(whole) :])


def test_one_process_does_all_the_work_and_raises_its_own_errors():
    ranks = Ranks()
    assert (ranks.first, ranks.synced_generation) == (True, False)
    results = list(ranks.deal(BATCHES, str.upper, lambda text: text * 2))
    assert results == ["AA", "BB", "CC"]
    assert list(ranks.deal([], str.upper)) == []
    with pytest.raises(ZeroDivisionError):
        list(ranks.deal([0], lambda number: 1 / number))


def test_a_strategy_that_keeps_weights_otherwise_is_refused():
    trainer = Trainer(1)
    trainer.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match=r"trainer.strategy: FSDPStrategy .* trainer=fsdp to"):
        check_strategy(trainer, None, None)


@pytest.mark.parametrize(("world_size", "kind"), [(1, RuntimeError), (2, DataError)])
def test_one_process_has_waited_for_no_other(world_size, kind):
    trainer = Trainer(world_size)
    trainer.global_rank = trainer.global_step = 0
    trainer.default_root_dir = "run"
    with pytest.raises(kind), rank_timeouts_as_data_errors(trainer):
        raise RuntimeError("DataLoader timed out after 60 seconds")


def test_one_process_reads_its_flag_at_once():
    flag = SharedFlag(Trainer(1))
    assert [flag.exchange(False), flag.exchange(True), flag.settle(True)] == [False, True, True]
    flag.close()


@pytest.mark.parametrize("strategy_class", [Replicated, Sharded])
def test_ranks_wait_as_long_as_their_strategy(strategy_class):
    assert strategy_timeout(strategy_class(timeout_minutes=3)) == timedelta(minutes=3)


def in_rank(rank, folder):
    """Writes into `folder` what this rank has seen."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    seen = {
        "replicated": deal(rank, lockstep=False),
        "lockstep": deal(rank, lockstep=True),
        "same rows": list(Ranks(0, 1, dist.group.WORLD, lockstep=True).deal(BATCHES, str.upper)),
        "error in prepare": deal_wrong(rank, "prepare"),
        "error in compute": deal_wrong(rank, "compute"),
        "flags": exchange_flags(rank),
    }
    (folder / f"rank{rank}").write_text(repr(seen))


def deal(rank, lockstep):
    """The results on this rank, and the batches that were its work."""
    works = []
    ranks = Ranks(rank, RANKS, dist.group.WORLD, lockstep)
    results = list(ranks.deal(BATCHES, str.upper, lambda text: works.append(text) or text * 2))
    return results, works


def deal_wrong(rank, wrong):
    """What is raised where the third batch, the first rank's, is wrong."""

    def fail(text):
        if text == "c":
            raise OSError("no such picture")
        return text

    functions = (fail, str) if wrong == "prepare" else (str, fail)
    results = []
    began = time.monotonic()
    try:
        for result in Ranks(rank, RANKS, dist.group.WORLD).deal(BATCHES, *functions):
            results.append(result)
    except (OSError, DataError) as error:
        assert time.monotonic() - began < 60
        return results, type(error).__name__, str(error)
    return results


def exchange_flags(rank):
    """What this rank reads after each of five steps, of which its own flag goes up in one."""
    flag = SharedFlag(Trainer(RANKS))
    up_at = {0: 3, 1: 1}[rank]
    seen = []
    for step in range(5):
        time.sleep(0.05 * rank)
        seen.append(flag.exchange(step >= up_at))
    flag.read()
    # a signal to the second rank alone, after the last step
    seen.append(flag.settle(rank == 1))
    flag.close()
    return seen


@pytest.mark.slow
def test_two_ranks_share_batches_errors_and_flags(tmp_path):
    multiprocessing.spawn(in_rank, (tmp_path,), nprocs=RANKS)
    first, second = (eval((tmp_path / f"rank{rank}").read_text()) for rank in range(RANKS))
    everything = ["AA", "BB", "CC"]
    assert first["replicated"] == (everything, ["A", "C"])
    assert second["replicated"] == (everything, ["B"])
    assert first["lockstep"] == (everything, ["A", "C"])
    # the last batch again, whose result counts once
    assert second["lockstep"] == (everything, ["B", "C"])
    assert first["same rows"] == second["same rows"] == ["A", "B", "C"]
    for wrong in ("prepare", "compute"):
        assert first[f"error in {wrong}"] == (["a", "b"], "OSError", "no such picture")
        results, kind, message = second[f"error in {wrong}"]
        assert (results, kind) == (["a", "b"], "DataError")
        assert message == "rank 0 has failed: OSError: no such picture"
    # up on one rank in step 1: read by both in step 2
    assert first["flags"] == second["flags"] == [False, False, True, True, True, True]
