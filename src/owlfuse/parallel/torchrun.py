"""The processes of torchrun, each of which answers its share of the questions."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from lightning import Fabric
from lightning.fabric.strategies import DDPStrategy

LONGEST_WAIT = timedelta(days=7)
"""A rank with easy questions waits for one with hard ones; where one dies, torchrun ends the
others."""


class Ranks:
    """This process among those that torchrun started; alone where it did not."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.fabric: Any = None
        if self.count > 1:
            # ranks tell each other nothing but that they are there, which gloo does on any machine
            strategy = DDPStrategy(process_group_backend="gloo", timeout=LONGEST_WAIT)
            each = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
            self.fabric = Fabric(
                accelerator="cpu", devices=each, num_nodes=self.count // each, strategy=strategy
            )
            self.fabric.launch()

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes results."""
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """Every so-manieth item, those of all ranks together being all."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.fabric is not None:
            self.fabric.barrier()
