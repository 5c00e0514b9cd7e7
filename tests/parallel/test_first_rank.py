"""The other ranks wait for the first one's work, and end when it fails."""

import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from owlfuse.core.errors import DataError
from owlfuse.parallel import first_rank

RANKS = 2


def run_rank(rank, folder, fails):
    """Writes into `folder` what a rank raised, and how long it waited."""
    first_rank.HEARTBEAT_SECONDS = 0.1
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    began = time.monotonic()
    try:
        first_rank.run_on_first_rank(lambda: work(folder, fails), "the export")
        result = "returned"
    except (DataError, OSError) as error:
        result = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}").write_text(f"{time.monotonic() - began} {result}")
    dist.destroy_process_group()


def work(folder, fails):
    time.sleep(1)
    if fails:
        raise OSError("the disk is full")
    with (folder / "done").open("x") as file:
        file.write("once")


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_every_rank_ends_when_the_first_one_has_done_its_work_or_failed(tmp_path, fails):
    multiprocessing.spawn(run_rank, (tmp_path, fails), nprocs=RANKS)
    texts = [(tmp_path / f"rank{rank}").read_text() for rank in range(RANKS)]
    seconds, results = zip(*(text.split(" ", 1) for text in texts))
    assert min(map(float, seconds)) > 0.9
    if fails:
        assert results[0] == "OSError: the disk is full"
        assert results[1].startswith("DataError: rank 0 could not finish the export")
    else:
        assert results == ("returned", "returned")
    assert (tmp_path / "done").exists() != fails


def test_one_process_works_by_itself(tmp_path):
    first_rank.run_on_first_rank(lambda: work(tmp_path, False), "the export")
    assert (tmp_path / "done").exists()
    with pytest.raises(OSError, match="full"):
        first_rank.run_on_first_rank(lambda: work(tmp_path, True), "the export")
