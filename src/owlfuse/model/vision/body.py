"""timm's models without a classifier, at any size, and without modules that the features do not
use."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.mvitv2 import MultiScaleVit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from owlfuse.core.errors import first_line
from owlfuse.core.hub_access import check_hub_has
from owlfuse.core.packages import packaged

PREFIX_TOKENS = ("cls_token", "class_token", "dist_token", "reg_token", "register_tokens")
"""Names of learned tokens in timm's models."""


def create_body(
    name: str,
    pretrained: bool,
    image_size: int | None,
    kwargs: dict[str, Any],
    weights: str | None = None,
) -> nn.Module:
    """Returns the timm model without its classifier, with the weights of a file where one is named,
    set to the size. On the meta device no weights are loaded, and those of a file are checked."""
    if pretrained and weights:
        raise ValueError(
            f"pretrained asks for timm's weights and weights for {weights}; give one of the two"
        )
    if weights == "":
        raise ValueError("weights= is empty; name a file, or leave it out")
    has_weights = bool(pretrained or weights)
    # there is nothing to load into, and a plan should need no download
    pretrained = pretrained and torch.get_default_device().type != "meta"
    if pretrained and (hub_name := hub_name_of(name, kwargs.get("pretrained_cfg_overlay") or {})):
        check_hub_has(
            hub_name,
            "set model.vision.weights to a file with them, or HF_HOME to a cache that has it",
        )
    builds_at_size = image_size is not None and name.startswith("mvitv2")
    if builds_at_size:
        # timm resamples its tables while it loads weights, and not later
        kwargs = {"img_size": image_size, **kwargs}
    try:
        body = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    # timm's models check their arguments by assertions
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm's {name} does not take these kwargs ({kwargs}): {error}") from error
    except RuntimeError as error:
        similar = timm.list_models(f"*{name.split('_')[0]}*")[:4]
        suggestion = f"; timm has {', '.join(similar)}, ..." if similar else ""
        raise ValueError(f"{name}: {error}{suggestion}") from error
    if has_weights:
        check_activation(body, name)
    if weights:
        load_weights(body, weights, name, kwargs)
    if image_size is not None and not builds_at_size:
        set_input_size(body, name, image_size)
    return body


def check_activation(body: Any, name: str) -> None:
    """Raise ValueError for a CLIP whose weights were trained with QuickGELU, and which timm builds
    with GELU under this name, as its notes say."""
    notes = (getattr(body, "pretrained_cfg", None) or {}).get("notes") or ()
    if "quickgelu" in name or not any("quickgelu" in note.lower() for note in notes):
        return
    with_quick = name.replace("_clip_", "_clip_quickgelu_")
    advice = f"take {with_quick}" if timm.is_model(with_quick) else "take its quickgelu variant"
    raise ValueError(
        f"{name}: its weights were trained with the activation QuickGELU, and timm gives it GELU "
        f"under this name; {advice}"
    )


def set_input_size(body: Any, name: str, image_size: int) -> None:
    """Sets the side in pixels, where the model has one.

    Raises ValueError for one under 1, or that its patches do not divide.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}, expected pixels, or null for the model's")
    patch: Any = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple | list) else patch
    projection: Any = getattr(getattr(body, "patch_embed", None), "proj", None)
    # as PVTv2's, whose kernel timm calls a patch
    overlaps = isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size
    if side and image_size % side and not overlaps:
        raise ValueError(
            f"image_size is {image_size}, which {name}'s patches of {side} pixels do not divide"
        )
    # of the others convolutional models take any size; what does not fails when it is measured
    if hasattr(body, "set_input_size"):
        body.set_input_size(img_size=(image_size, image_size))
    elif isinstance(body, MultiScaleVit):
        # which would look its tables of relative positions up at places of another grid
        raise ValueError(f"image_size: timm's {name} has the size that it was built with")


def count_prefix_tokens(body: nn.Module) -> int:
    """Returns how many tokens before the patches (class, distillation and register tokens) a
    model's features have: timm's number, or where it has none (VOLO, PiT) the model's learned
    tokens, (1, n, Dv) each."""
    stated = getattr(body, "num_prefix_tokens", None)
    if stated is not None:
        return int(stated)
    count = 0
    for name, parameter in body.named_parameters():
        if name in PREFIX_TOKENS and parameter.ndim == 3:
            count += parameter.shape[1]
    return count


def all_differentiable(module: nn.Module) -> nn.Module:
    """Returns the module, whose parameters are replaced by ones that are not frozen."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            # new parameters: requires_grad of the model's own is the adapters' alone
            setattr(child, name, nn.Parameter(parameter.data))
    return module


def unused_parameters(module: nn.Module, output: Tensor) -> set[str]:
    """Returns the names of the parameters that `output` does not depend on."""
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


class Removed(nn.Identity):
    """What stands for a stage or a block that the features do not use: timm sets the size of all
    of them."""

    resolution = None
    rel_pos = None

    @property
    def attn(self) -> Removed:
        """The block's attention."""
        return self

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Nothing has a size here."""

    def set_window_size(self, *args: Any, **kwargs: Any) -> None:
        """Nothing has a window here."""


def remove_modules(module: nn.Module, unused: set[str], prefix: str = "") -> None:
    """Replaces each module whose every parameter is unused by an Identity."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        parameters = [path + parameter for parameter, _ in child.named_parameters()]
        if parameters and unused.issuperset(parameters):
            # an Identity, since timm's forward still calls it
            setattr(module, name, Removed())
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
    # shapes are enough to check a file
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.device("meta"):
        tensors = read_weights(Path(packaged(weights)).expanduser(), device)
        expected = timm.create_model(name, **kwargs).state_dict()  # with its classifier
    # files of weights hold the classifier, which the body lacks
    head = set(expected) - set(body.state_dict())
    try:
        if set(body.state_dict()) <= set(tensors):
            check_by_name(tensors, expected, head)
        else:
            tensors = rename_by_order(tensors, expected, head)
    except ValueError as error:
        raise ValueError(
            f"weights: {weights}: {error}; expected the {len(expected)} tensors of timm's {name}"
        ) from error
    if device != "meta":
        body.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in head})


def read_weights(path: Path, device: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by name. Raises ValueError."""
    try:
        content = load_state_dict(str(path), device=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"weights: {path}: no such file") from None
    except (
        pickle.UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise ValueError(
            f"weights: {path} is no file of weights: {first_line(error)[:160]}"
        ) from error
    is_state_dict = isinstance(content, dict) and all(
        isinstance(tensor, Tensor) for tensor in content.values()
    )
    if not is_state_dict:
        raise ValueError(f"weights: {path} holds something else than tensors by name")
    return content


def check_by_name(tensors: dict[str, Tensor], expected: dict[str, Tensor], head: set[str]) -> None:
    """Raises ValueError for a tensor of another shape than timm's of its name, or unknown to
    timm."""
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(f"{unknown[0]} and {len(unknown) - 1} more are unknown to the model")
    for name, tensor in tensors.items():
        if name not in head and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)}"
            )


def rename_by_order(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], head: set[str]
) -> dict[str, Tensor]:
    """Returns the tensors under timm's names, in order: the last words of both names (`weight`,
    `running_mean`, ...), integer or floating point and, but for the classifier (`head`), the shapes
    must be the same. Raises ValueError where they first are not."""
    if len(tensors) != len(expected):
        raise ValueError(f"{len(tensors)} tensors, the first {next(iter(tensors), 'none')}")
    pairs = zip(tensors.items(), expected.items())
    for number, ((file_name, tensor), (name, expected_tensor)) in enumerate(pairs):
        fits = (
            file_name.rpartition(".")[2] == name.rpartition(".")[2]
            and tensor.is_floating_point() == expected_tensor.is_floating_point()
            and (name in head or tensor.shape == expected_tensor.shape)
        )
        if not fits:
            raise ValueError(
                f"tensor {number} is {file_name} {tuple(tensor.shape)}, where {name} "
                f"{tuple(expected_tensor.shape)} comes"
            )
    return dict(zip(expected, tensors.values()))


def checkpoint_blocks(body: Any, enable: bool) -> None:
    """Turns gradient checkpointing of a timm model's blocks on or off.

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
        # turning off what a model does not have is no error
        if enable:
            raise ValueError(
                f"gradient_checkpointing: timm's {name} does not support it; leave it false"
            ) from error


def hub_name_of(name: str, overlay: dict[str, Any]) -> str | None:
    """Returns the hub's name for the pretrained weights of a timm model; None for weights from
    elsewhere.

    Args:
        overlay: replaces timm's own fields of the weights, `file` for instance.
    """
    if overlay.get("file") or overlay.get("url") or "hf_hub_id" in overlay:
        return overlay.get("hf_hub_id")
    scheme, _, hub_name = name.rpartition(":")
    if scheme in ("hf-hub", "hf_hub"):
        return hub_name.partition("@")[0]  # without its revision
    if scheme:
        return None
    pretrained_cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return getattr(pretrained_cfg, "hf_hub_id", None) or None
