"""The loss: cross-entropy summed over supervised tokens.

Letters: B rows, T text positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from owlfuse.core.types import Batch


def batch_loss(model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """`token_loss` of a batch.

    Where its supervised places are known, logits are computed there alone.
    """
    if batch.supervised is None:
        return token_loss(model(batch), batch.labels)
    # padded positions have the target -100, and count for nothing
    targets = batch.targets().index_select(0, batch.supervised)
    return summed_loss(model(batch, logits_to_keep=batch.supervised), targets)


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token summed over the supervised ones, and their number. logits
    (B, T, V), labels (B, T)."""
    return summed_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets (R,) that are not -100, and their number. logits (R,
    V)."""
    # not divided yet: ranks and micro-batches have other numbers of tokens, and are added first
    return token_losses(logits, targets).sum(), (targets != -100).sum()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy (R,) of each target (R,), 0 where it is -100. logits (R, V).

    In float32 at least, in float64 where the logits are.
    """
    # a softmax over a large vocabulary in bfloat16 loses the small terms
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
