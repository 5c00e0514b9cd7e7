"""Work that the first rank does while the others wait, however long it takes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch
import torch.distributed as dist

from owlfuse.core.errors import DataError

HEARTBEAT_SECONDS = 5.0
WORKING, DONE, FAILED = range(3)


def run_on_first_rank(work: Callable[[], object], name: str) -> None:
    """Runs `work` on rank 0, and returns on every rank when it has ended.

    A single barrier would time out while rank 0 writes a large model, and a rank that looked for a
    file would wait without an end where rank 0 fails or writes to a disk of its own. So rank 0
    works in a thread and says every few seconds that it is alive: where it is gone, the next such
    message fails on the other ranks.

    Args:
        name: of the work, for messages.

    Raises:
        Exception: on rank 0, what `work` raises.
        DataError: on other ranks, where `work` failed or rank 0 is gone.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        work()
        return
    # A group of CPUs: a device that computes is not asked.
    group: Any = dist.new_group(backend="gloo")
    status = torch.tensor(WORKING)
    if dist.get_rank() == 0:
        with ThreadPoolExecutor(max_workers=1) as executor:
            future = executor.submit(work)
            while status == WORKING:
                # It ends early with the work, so that a short one does not wait for a heartbeat.
                wait_for([future], timeout=HEARTBEAT_SECONDS)
                if future.done():
                    status.fill_(DONE if future.exception() is None else FAILED)
                dist.broadcast(status, src=0, group=group)
        dist.destroy_process_group(group)
        # raises what the work raised, after the others know of it
        future.result()
        return
    try:
        while status == WORKING:
            dist.broadcast(status, src=0, group=group)
    except RuntimeError as error:  # torch has no class for a connection that was closed
        raise DataError(f"rank 0 has ended during {name}, without a message") from error
    dist.destroy_process_group(group)
    if status == FAILED:
        raise DataError(f"rank 0 could not finish {name}; its message says why")
