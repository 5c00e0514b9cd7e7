"""Weights of a timm model from a file: under timm's names, or under another library's in timm's order."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from owlfuse.packages import packaged


def load_weights(body: nn.Module, weights: str, name: str, kwargs: dict[str, Any]) -> None:
    """Loads a file into a timm model that has no classifier. On the meta device the file is checked and nothing is loaded.

    Args:
        weights: a state dict of the whole model, as torch (read with `weights_only`) or safetensors writes it, its names
            timm's or its tensors in timm's order; a path or a `package:` name.
        name, kwargs: what timm made the model from.

    Raises:
        ValueError: no such file, none of weights, or weights of another model: the first tensor that differs is named.
    """
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.device("meta"):
        found = read_weights(Path(packaged(weights)).expanduser(), device)
        whole = timm.create_model(name, **kwargs).state_dict()
    head = set(whole) - set(body.state_dict())
    try:
        named = by_name(found, whole, head) if set(body.state_dict()) <= set(found) else by_order(found, whole, head)
    except ValueError as error:
        raise ValueError(f"weights: {weights}: {error}; expected the {len(whole)} tensors of timm's {name}") from error
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
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"weights: {path} holds something else than tensors by name")
    return found


def by_name(found: dict[str, Tensor], expected: dict[str, Tensor], head: set[str]) -> dict[str, Tensor]:
    """The tensors under their own names, which are timm's. Raises ValueError for one of another shape or unknown to timm."""
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(f"{unknown[0]} and {len(unknown) - 1} more are unknown to the model")
    for name, tensor in found.items():
        if name not in head and tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
    return found


def by_order(found: dict[str, Tensor], expected: dict[str, Tensor], head: set[str]) -> dict[str, Tensor]:
    """The tensors under timm's names, taken in order: the last words of both names (`weight`, `running_mean`, ...), the kinds
    of numbers and, but for the classifier (`head`), the shapes must be the same. Raises ValueError where they first are not."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} tensors, the first {next(iter(found), 'none')}")
    for number, (theirs, ours) in enumerate(zip(found, expected)):
        facts = [
            (name.rpartition(".")[2], tensor.is_floating_point(), tensor.shape if ours not in head else None)
            for name, tensor in ((theirs, found[theirs]), (ours, expected[ours]))
        ]
        if facts[0] != facts[1]:
            raise ValueError(
                f"tensor {number} is {theirs} {tuple(found[theirs].shape)}, where {ours} {tuple(expected[ours].shape)} comes"
            )
    return dict(zip(expected, found.values()))
