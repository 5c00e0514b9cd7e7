"""Batch norms over the images of all ranks, and of images without statistics.

N images, C channels, S places of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncedBatchNorm(_BatchNorm):
    """A batch norm over the images of all ranks, on any device (torch's own needs a GPU): (N, C,
    ...) -> (N, C, ...).

    It shares parameters and statistics with the norm it stands for, timm's with an activation
    included. With `blank` set a rank adds nothing to the statistics, and still takes part.

    Args:
        norm: the batch norm that it takes the place of.
        add_over_ranks: the sum of a tensor over the ranks, with a gradient.
    """

    def __init__(self, norm: _BatchNorm, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False
        )
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            # torch has registered these names as empty buffers, which are filled here
            setattr(self, name, buffer)
        self.add_over_ranks = add_over_ranks
        self.blank = False
        self.drop, self.act = getattr(norm, "drop", None), getattr(norm, "act", None)
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on."""

    def forward(self, input: Tensor) -> Tensor:
        """See torch's."""
        output = self.synced(input) if self.training else super().forward(input)
        for after in (self.drop, self.act):
            output = output if after is None else after(output)
        return output

    def synced(self, input: Tensor) -> Tensor:
        """Normed by the statistics of all ranks together; by the running ones where they have
        one value a channel, or none."""
        assert self.running_mean is not None
        assert self.running_var is not None
        # sums over many images lose digits in half precision
        rows = input.float().transpose(0, 1).flatten(1)  # (C, N * S)
        # times zero, since every rank has to take part in the sums
        share = 0.0 if self.blank else 1.0
        count = rows.new_full((1,), rows.shape[1] * share)
        total = self.add_over_ranks(torch.cat([rows.sum(1) * share, count]))
        sums, count = total[:-1], total[-1]
        mean = sums / count.clamp_min(1)
        # of the differences to the mean: a difference of large squares would lose digits
        variance = self.add_over_ranks(
            (rows - mean[:, None]).square().sum(1) * share
        ) / count.clamp_min(1)
        with torch.no_grad():
            # a tensor and no branch, so that the device is not waited for
            some = count > 1
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            moment = self.momentum * some
            self.running_mean.lerp_(mean.to(self.running_mean), moment)
            unbiased = variance * count / (count - 1).clamp_min(1)
            self.running_var.lerp_(unbiased.to(self.running_var), moment)
            self.num_batches_tracked.add_(some)
        use = some & torch.tensor(not self.blank, device=some.device)
        mean, variance = (
            torch.where(use, mean, self.running_mean),
            torch.where(use, variance, self.running_var),
        )
        shape = [1, -1, *[1] * (input.ndim - 2)]
        scale = (variance + self.eps).rsqrt() * (self.weight if self.affine else 1)
        centred = (input - mean.view(shape)) * scale.view(shape)
        return (centred + self.bias.view(shape) if self.affine else centred).to(input.dtype)


def allow_single_values(module: nn.Module) -> None:
    """Has the batch norms below a module use their running statistics where a batch holds one value
    of a channel, a single image of 1x1 features, for which torch raises in training."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.register_forward_pre_hook(keep_statistics)
            norm.register_forward_hook(take_statistics)


def keep_statistics(norm: _BatchNorm, args: tuple[Tensor]) -> None:
    """Before a norm's forward."""
    if norm.training and args[0].numel() == norm.num_features:
        norm.eval()
        # of torch, any name may be a tensor or a module
        norm.had_single_value = True  # type: ignore[assignment]


def take_statistics(norm: _BatchNorm, args: tuple[Tensor], output: Tensor) -> None:
    """After a norm's forward."""
    if getattr(norm, "had_single_value", False):
        norm.train()
        norm.had_single_value = False  # type: ignore[assignment]


def set_blank(norms: list[_BatchNorm], blank: bool) -> None:
    """Has norms leave out what they see, and take it again; one that is synchronized over ranks
    takes part all the same."""
    for norm in norms:
        if isinstance(norm, SyncedBatchNorm):
            norm.blank = blank
        else:
            norm.train(not blank)
