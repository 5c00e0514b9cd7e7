"""The processes of torchrun, each of which answers its share of the questions."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning import Fabric
from lightning.fabric.strategies import DDPStrategy

from owlfuse.parallel.ranks import Ranks

LONGEST_WAIT = timedelta(days=7)
"""A rank with easy questions waits for one with hard ones; where one dies, torchrun ends the
others."""


def torchrun_processes() -> int | None:
    """Return how many processes torchrun has started with this one; None where it has not.
    WORLD_SIZE alone may be left behind by another launcher."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else None


class TorchrunRanks(Ranks):
    """This process among those that torchrun started; alone where it did not."""

    def __init__(self) -> None:
        processes = torchrun_processes()
        count = processes or 1
        self.local = int(os.environ["LOCAL_RANK"]) if processes else 0
        group: Any = None
        if count > 1:
            # ranks send each other small objects alone, which gloo does on any machine
            strategy = DDPStrategy(process_group_backend="gloo", timeout=LONGEST_WAIT)
            # All processes are on one machine where torchrun does not say how many are on each.
            each = int(os.environ.get("LOCAL_WORLD_SIZE", count))
            fabric = Fabric(
                accelerator="cpu", devices=each, num_nodes=count // each, strategy=strategy
            )
            fabric.launch()
            group = dist.group.WORLD
        super().__init__(int(os.environ["RANK"]) if processes else 0, count, group)

    @property
    def device(self) -> torch.device:
        """Where this process computes: on a GPU of its own where there are any."""
        return torch.device(f"cuda:{self.local}" if torch.cuda.is_available() else "cpu")
