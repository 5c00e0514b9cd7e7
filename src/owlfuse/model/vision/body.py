"""timm's models as they are used here: without a classifier, at any size, and without what the
features do not need."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from owlfuse.core.hub_access import check_hub_has
from owlfuse.core.packages import packaged

PREFIX_TOKENS = ("cls_token", "class_token", "dist_token", "reg_token", "register_tokens")
"""What timm's models call their learned tokens."""


def create_body(
    name: str,
    pretrained: bool,
    image_size: int | None,
    kwargs: dict[str, Any],
    weights: str | None = None,
) -> nn.Module:
    """The timm model without its classifier, with the weights of a file where one is named, set to
    the size. On the meta device no weights are asked for, and those of a file are checked."""
    if pretrained and weights:
        raise ValueError(
            f"pretrained asks for timm's weights and weights for {weights}; give one of the two"
        )
    pretrained = pretrained and torch.get_default_device().type != "meta"
    if pretrained and (hub_name := hub_name_of(name, kwargs.get("pretrained_cfg_overlay") or {})):
        check_hub_has(
            hub_name,
            "set model.vision.weights to a file with them, or HF_HOME to a cache that has it",
        )
    try:
        body = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm's {name} does not take these kwargs ({kwargs}): {error}") from error
    except RuntimeError as error:
        near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
        raise ValueError(
            f"{name}: {error}" + (f"; timm has {', '.join(near)}, ..." if near else "")
        ) from error
    if weights:
        load_weights(body, weights, name, kwargs)
    if image_size:
        set_input_size(body, name, image_size)
    return body


def set_input_size(body: Any, name: str, image_size: int) -> None:
    """Sets the side in pixels, where the model has one.

    Raises ValueError for one that its patches do not divide.
    """
    patch = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    if patch and image_size % patch[0]:
        raise ValueError(
            f"image_size is {image_size}, which {name}'s patches of {patch[0]} pixels do not divide"
        )
    if hasattr(body, "set_input_size"):
        body.set_input_size(img_size=(image_size, image_size))


def count_prefix_tokens(body: nn.Module) -> int:
    """How many tokens that are no patches (class, distillation and register tokens) stand first
    among those of a model's features: what timm says, or where it says nothing (VOLO, PiT) the
    model's learned tokens, (1, n, Dv) each."""
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


def load_weights(body: nn.Module, weights: str, name: str, kwargs: dict[str, Any]) -> None:
    """Loads a file into a timm model that has no classifier. On the meta device the file is checked
    and nothing is loaded.

    Args:
        weights: a state dict of the whole model, as torch (read with `weights_only`) or safetensors
            writes it, its names timm's or its tensors in timm's order; a path or a `package:` name.
        name, kwargs: what timm made the model from.

    Raises:
        ValueError: no such file, none of weights, or weights of another model: the first tensor
            that differs is named.
    """
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.device("meta"):
        found = read_weights(Path(packaged(weights)).expanduser(), device)
        whole = timm.create_model(name, **kwargs).state_dict()
    head = set(whole) - set(body.state_dict())
    try:
        named = (
            by_name(found, whole, head)
            if set(body.state_dict()) <= set(found)
            else by_order(found, whole, head)
        )
    except ValueError as error:
        raise ValueError(
            f"weights: {weights}: {error}; expected the {len(whole)} tensors of timm's {name}"
        ) from error
    if device != "meta":
        body.load_state_dict({key: tensor for key, tensor in named.items() if key not in head})


def read_weights(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises ValueError."""
    try:
        found = load_state_dict(str(path), device=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"weights: {path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(f"weights: {path} is no file of weights: {reason}") from error
    if not isinstance(found, dict) or not all(
        isinstance(tensor, Tensor) for tensor in found.values()
    ):
        raise ValueError(f"weights: {path} holds something else than tensors by name")
    return found


def by_name(
    found: dict[str, Tensor], expected: dict[str, Tensor], head: set[str]
) -> dict[str, Tensor]:
    """The tensors under their own names, which are timm's.

    Raises ValueError for one of another shape or unknown to timm.
    """
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(f"{unknown[0]} and {len(unknown) - 1} more are unknown to the model")
    for name, tensor in found.items():
        if name not in head and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)}"
            )
    return found


def by_order(
    found: dict[str, Tensor], expected: dict[str, Tensor], head: set[str]
) -> dict[str, Tensor]:
    """The tensors under timm's names, taken in order: the last words of both names (`weight`,
    `running_mean`, ...), the kinds of numbers and, but for the classifier (`head`), the shapes must
    be the same. Raises ValueError where they first are not."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} tensors, the first {next(iter(found), 'none')}")
    for number, (theirs, ours) in enumerate(zip(found, expected)):
        facts = [
            (
                name.rpartition(".")[2],
                tensor.is_floating_point(),
                tensor.shape if ours not in head else None,
            )
            for name, tensor in ((theirs, found[theirs]), (ours, expected[ours]))
        ]
        if facts[0] != facts[1]:
            raise ValueError(
                f"tensor {number} is {theirs} {tuple(found[theirs].shape)}, where {ours} "
                f"{tuple(expected[ours].shape)} comes"
            )
    return dict(zip(expected, found.values()))


def checkpoint_blocks(body: Any, enable: bool) -> None:
    """Has a timm model compute its blocks' activations again in the backward pass, or keep them.

    Raises:
        ValueError: a model that cannot, or one with batch norms, whose statistics would move twice
            a step.
    """
    name = type(body).__name__
    if enable and any(isinstance(module, _BatchNorm) for module in body.modules()):
        raise ValueError(
            f"gradient_checkpointing: {name} has batch norms, whose statistics would move twice a "
            "step; leave it false"
        )
    try:
        body.set_grad_checkpointing(enable)
    except (AssertionError, AttributeError) as error:
        if enable:
            raise ValueError(
                f"gradient_checkpointing: timm's {name} does not support it; leave it false"
            ) from error


def hub_name_of(name: str, overlay: dict[str, Any]) -> str | None:
    """The hub's name for the pretrained weights of a timm model; None where they come from
    elsewhere.

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
