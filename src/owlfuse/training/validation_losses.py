"""The losses of the validation sources during training, of the batches of all ranks."""

from __future__ import annotations

import logging
import math

import torch
from lightning import Trainer
from torch import Tensor

from owlfuse.core.types import Batch
from owlfuse.data.notes import BatchRemarks
from owlfuse.parallel.collectives import all_gather_objects, in_float64

log = logging.getLogger(__name__)


class ValidationLosses:
    """Adds up what this rank's batches of a validation give, and puts all ranks' together at its
    end. Nothing is read from the device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        """By source, of each batch: (2,) the loss summed over supervised tokens, and their
        number."""
        self.remarks: dict[str, list[BatchRemarks]] = {}

    def add(self, source: str, batch: Batch, loss: Tensor, tokens: Tensor) -> None:
        """Adds a batch of a source, with its summed loss."""
        # float64, so that sums of single batches lose nothing before they are added up
        sums = torch.stack([in_float64(loss.detach()), in_float64(tokens)])
        self.sums.setdefault(source, []).append(sums)
        self.remarks.setdefault(source, []).append(BatchRemarks.of(batch))

    def end(self, trainer: Trainer) -> tuple[dict[str, float], list[BatchRemarks]]:
        """Returns the loss per supervised token of each source in which something is supervised,
        and what there was to say of the batches, in the order that one process has. All ranks call
        it."""
        sums = {source: torch.stack(rows).tolist() for source, rows in self.sums.items()}
        of_ranks = all_gather_objects(trainer, (sums, self.remarks))
        self.sums, self.remarks = {}, {}
        losses: dict[str, float] = {}
        remarks: list[BatchRemarks] = []
        for source in sums:
            rows = [row for rank_sums, _ in of_ranks for row in rank_sums[source]]
            tokens = math.fsum(count for _, count in rows)
            if tokens:
                # exact, whatever the order: the same for any number of ranks
                losses[source] = math.fsum(loss for loss, _ in rows) / tokens
            elif trainer.is_global_zero:
                log.warning(
                    "validation source %s: no token is supervised, as where every sample is "
                    "skipped; it has no loss",
                    source,
                )
            # round by round, since the batches were dealt out to the ranks in turn
            for round_remarks in zip(*(rank_remarks[source] for _, rank_remarks in of_ranks)):
                remarks += round_remarks
        return losses, remarks
