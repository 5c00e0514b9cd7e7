"""An optimizer of timm under the schedule and the parameter groups of AdamWCosine."""

from typing import Any

from timm.optim import Lion
from torch.optim import Optimizer

from owlfuse.training.optim import AdamWCosine


class LionCosine(AdamWCosine):
    """Lion (arXiv 2302.06675): the sign of a running mean.

    Its learning rate is a third to a tenth of AdamW's.
    """

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """See `AdamWCosine`."""
        return Lion(groups, lr=self.lr, betas=self.betas)
