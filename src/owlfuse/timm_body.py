"""timm's models as they are used here: without a classifier, at any size, and without what the features do not need."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from owlfuse.backbone_weights import load_weights
from owlfuse.hub_access import check_hub_has

PREFIX_TOKENS = ("cls_token", "class_token", "dist_token", "reg_token", "register_tokens")
"""What timm's models call their learned tokens."""


def create_body(
    name: str, pretrained: bool, image_size: int | None, kwargs: dict[str, Any], weights: str | None = None
) -> nn.Module:
    """The timm model without its classifier, with the weights of a file where one is named, set to the size. On the meta device
    no weights are asked for, and those of a file are checked."""
    if pretrained and weights:
        raise ValueError(f"pretrained asks for timm's weights and weights for {weights}; give one of the two")
    pretrained = pretrained and torch.get_default_device().type != "meta"
    if pretrained and (hub_name := hub_name_of(name, kwargs.get("pretrained_cfg_overlay") or {})):
        check_hub_has(hub_name, "set model.vision.weights to a file with them, or HF_HOME to a cache that has it")
    try:
        body = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm's {name} does not take these kwargs ({kwargs}): {error}") from error
    except RuntimeError as error:
        near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
        raise ValueError(f"{name}: {error}" + (f"; timm has {', '.join(near)}, ..." if near else "")) from error
    if weights:
        load_weights(body, weights, name, kwargs)
    if image_size:
        set_input_size(body, name, image_size)
    return body


def hub_name_of(name: str, overlay: dict[str, Any]) -> str | None:
    """The hub's name for the pretrained weights of a timm model; None where they come from elsewhere.

    Args:
        overlay: what takes the place of timm's own fields of the weights, `file` for instance.
    """
    if overlay.get("file") or overlay.get("url") or "hf_hub_id" in overlay:
        return overlay.get("hf_hub_id")
    scheme, _, rest = name.rpartition(":")
    if scheme in ("hf-hub", "hf_hub"):
        return rest.partition("@")[0]
    known = timm.get_pretrained_cfg(name, allow_unregistered=True) if not scheme else None
    return getattr(known, "hf_hub_id", None) or None


def set_input_size(body: Any, name: str, image_size: int) -> None:
    """Sets the side in pixels, where the model has one. Raises ValueError for one that its patches do not divide."""
    patch = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    if patch and image_size % patch[0]:
        raise ValueError(f"image_size is {image_size}, which {name}'s patches of {patch[0]} pixels do not divide")
    if hasattr(body, "set_input_size"):
        body.set_input_size(img_size=(image_size, image_size))


def count_prefix_tokens(body: nn.Module) -> int:
    """How many tokens that are no patches (class, distillation and register tokens) stand first among those of a model's
    features: what timm says, or where it says nothing (VOLO, PiT) the model's learned tokens, (1, n, Dv) each."""
    stated = getattr(body, "num_prefix_tokens", None)
    if stated is not None:
        return int(stated)
    learned = [p for name, p in body.named_parameters() if name in PREFIX_TOKENS and p.ndim == 3]
    return sum(parameter.shape[1] for parameter in learned)


def all_differentiable(module: nn.Module) -> nn.Module:
    """The module, with parameters that each have a gradient, whatever is frozen."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(parameter.data))
    return module


def unused_parameters(module: nn.Module, output: Tensor) -> set[str]:
    """Names of the parameters that `output` does not depend on."""
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def remove_modules(module: nn.Module, unused: set[str], prefix: str = "") -> None:
    """Puts an Identity for each module whose every parameter is unused."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        own = [path + n for n, _ in child.named_parameters()]
        if own and unused.issuperset(own):
            setattr(module, name, nn.Identity())
        else:
            remove_modules(child, unused, path)
