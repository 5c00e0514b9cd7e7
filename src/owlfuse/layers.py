"""What is done to a module's layers: activations computed again, layers compiled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def checkpoint_blocks(body: Any, enable: bool) -> None:
    """Has a timm model compute its blocks' activations again in the backward pass, or keep them.

    Raises:
        ValueError: a model that cannot, or one with batch norms, whose statistics would move twice a step.
    """
    name = type(body).__name__
    if enable and any(isinstance(module, _BatchNorm) for module in body.modules()):
        raise ValueError(
            f"gradient_checkpointing: {name} has batch norms, whose statistics would move twice a step; leave it false"
        )
    try:
        body.set_grad_checkpointing(enable)
    except (AssertionError, AttributeError) as error:
        if enable:
            raise ValueError(f"gradient_checkpointing: timm's {name} does not support it; leave it false") from error


def compile_layers(decoder: Iterable[nn.Module], body: nn.Module) -> None:
    """Has torch compile decoder layers and a timm model's blocks where they stand, each at its first call: names of parameters
    stay. A backbone that calls its blocks neither `blocks`, `stages` nor `layers` runs as it is."""
    blocks = next((getattr(body, name) for name in ("blocks", "stages", "layers") if hasattr(body, name)), ())
    for layer in (*decoder, *blocks):
        layer.compile()
