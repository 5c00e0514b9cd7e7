"""What of a model a checkpoint holds: what is trained, buffers, and a hash of what is frozen; and reading it back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from owlfuse.adapters import PARTS
from owlfuse.model import MultimodalLM, build_model
from owlfuse.parallel import read_folder
from owlfuse.runs import last_checkpoint
from owlfuse.types import DataError


def kept_names(model: nn.Module) -> list[str]:
    """Names of the state that a checkpoint holds: trained parameters and persistent buffers."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return [name for name in model.state_dict() if name not in frozen]


def frozen_hashes(model: MultimodalLM) -> dict[str, str]:
    """sha256 over names, shapes, types and bytes of the frozen parameters, by part; parts without any are left out."""
    hashes = {}
    for part in PARTS:
        frozen = {n: p for n, p in sorted(model.part(part).parameters.items()) if not p.requires_grad}
        digest = hashlib.sha256()
        for name, parameter in frozen.items():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            tensor = whole.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        if frozen:
            hashes[part] = digest.hexdigest()
    return hashes


def check_fits(model: MultimodalLM, weights: dict[str, Tensor], frozen: dict[str, str]) -> None:
    """Raises DataError with the part whose weights are missing, or whose frozen weights are not those of the training."""
    if missing := [name for name in kept_names(model) if name not in weights]:
        raise DataError(f"the checkpoint has no weights for {part_of(missing[0])}: {missing[0]} and {len(missing) - 1} more")
    if extra := [name for name in weights if name not in model.state_dict()]:
        raise DataError(f"the checkpoint has weights that the model lacks: {extra[0]} and {len(extra) - 1} more")
    found = frozen_hashes(model) if frozen else {}
    if wrong := [part for part in sorted({*frozen, *found}) if frozen.get(part) != found.get(part)]:
        raise DataError(
            f"the frozen weights of {', '.join(wrong)} are not those that the checkpoint was trained with; "
            "give back the same pretrained weights, init_from, seed and adapters"
        )


def part_of(name: str) -> str:
    """The part in whose module a parameter lies."""
    return name.partition(".")[0]


def weights_in(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state of the model, by its own names."""
    return {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}


def read(path: Path) -> dict[str, Any]:
    """A checkpoint: a file, its tensors mapped from the disk, or a folder of shards."""
    if path.is_dir():
        return read_folder(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def needs_base(path: Path) -> bool:
    """Whether a model needs the weights that the run started from, since some stayed frozen and are not in the checkpoint."""
    return path.is_dir() or bool(read(path).get("frozen"))


def load_run_model(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[MultimodalLM, dict[str, Any]]:
    """The model of a run's newest good checkpoint, its frozen weights made anew as training made them, and the checkpoint.

    Raises:
        ConfigError: the run has no good checkpoint.
        DataError: it does not fit the model, or the frozen weights are others now.
    """
    from owlfuse.hub.start import load_base  # which imports what reads a run

    checkpoint = read(last_checkpoint(folder))
    frozen = checkpoint.get("frozen", {})
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    init_from = config.get("init_from") if frozen else None
    base = load_base(init_from, config["model"], vocab_size) if init_from else None
    model, _ = build_model(config["model"], vocab_size, base)
    weights = weights_in(checkpoint)
    check_fits(model, weights, frozen)
    model.load_state_dict(weights, strict=False)
    return model, checkpoint
