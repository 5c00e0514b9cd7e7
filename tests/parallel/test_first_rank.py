"""The other ranks wait for the first one's work, and end when it fails."""

import os
import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from owlfuse.core.errors import DataError
from owlfuse.parallel import first_rank

RANKS = 2


def run_rank(rank, folder, outcome):
    """Writes into `folder` what a rank raised, and how long it waited."""
    first_rank.HEARTBEAT_SECONDS = 0.1
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    began = time.monotonic()
    try:
        first_rank.run_on_first_rank(lambda: work(folder, outcome), "the export")
        result = "returned"
    except (DataError, OSError) as error:
        result = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}").write_text(f"{time.monotonic() - began} {result}")


def work(folder, outcome):
    time.sleep(1)
    if outcome == "fails":
        raise OSError("the disk is full")
    if outcome == "is killed":
        os._exit(0)  # without a word to the other rank
    with (folder / "done").open("x") as file:
        file.write("once")


def run_ranks(folder, outcome):
    """Results by rank; none of one that was killed."""
    multiprocessing.spawn(run_rank, (folder, outcome), nprocs=RANKS)
    results = {}
    for path in folder.glob("rank*"):
        seconds, results[path.name] = path.read_text().split(" ", 1)
        assert 0.9 < float(seconds) < 60
    return results


@pytest.mark.slow
def test_every_rank_returns_when_the_first_one_has_done_its_work(tmp_path):
    assert run_ranks(tmp_path, "succeeds") == {"rank0": "returned", "rank1": "returned"}
    assert (tmp_path / "done").read_text() == "once"


@pytest.mark.slow
def test_the_other_ranks_end_when_the_first_one_fails_or_is_gone(tmp_path):
    (tmp_path / "failed").mkdir()
    results = run_ranks(tmp_path / "failed", "fails")
    assert results["rank0"] == "OSError: the disk is full"
    assert results["rank1"].startswith("DataError: rank 0 could not finish the export")
    (tmp_path / "killed").mkdir()
    results = run_ranks(tmp_path / "killed", "is killed")
    assert list(results) == ["rank1"]
    assert results["rank1"].startswith("DataError: rank 0 has ended during the export")


def test_one_process_works_by_itself(tmp_path):
    first_rank.run_on_first_rank(lambda: work(tmp_path, "succeeds"), "the export")
    assert (tmp_path / "done").exists()
    with pytest.raises(OSError, match="full"):
        first_rank.run_on_first_rank(lambda: work(tmp_path, "fails"), "the export")
