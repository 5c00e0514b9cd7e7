"""Batch norms: which of them learn, and what they do with an image without statistics."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def trained_norms(module: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norms below a module that use and move the statistics of what they see in
    training: all but those whose weight is frozen."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    return [norm for norm in norms if norm.weight is None or norm.weight.requires_grad]


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
