"""What of a model a checkpoint holds: what is trained, buffers, and a hash of what is frozen;
and reading it back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from owlfuse.core.errors import DataError
from owlfuse.model.adapters import PARTS
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.parallel.checkpoints import META, read_shards

HALVES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""The dtype of all weights by Lightning's precisions in which they have half of float32's bits."""


def set_precision(model: MultimodalLM, precision: Any) -> None:
    """Casts a model that was built in float32 to the one dtype of a run's precision, where it
    has one."""
    if precision in HALVES:
        model.to(HALVES[precision])
        model.llm.config.dtype = HALVES[precision]  # by which an export is read back


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turns what reading a checkpoint raises into a DataError that names it: a file that is
    damaged, or that holds code."""
    try:
        yield
    except UnpicklingError as error:
        raise DataError(
            f"checkpoint {path} holds more than tensors and plain values, and its code was not run"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"checkpoint {path} is no checkpoint of a run: {reason or type(error).__name__}"
        ) from error


def kept_names(model: nn.Module) -> list[str]:
    """Names of the state that a checkpoint holds: trained parameters and persistent buffers."""
    frozen = {
        name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    return [name for name in model.state_dict() if name not in frozen]


def frozen_hashes(model: MultimodalLM) -> dict[str, str]:
    """sha256 over names, shapes, types and bytes of the frozen parameters, by part; parts
    without any are left out."""
    hashes = {}
    for part in PARTS:
        frozen = {
            n: p for n, p in sorted(model.part(part).parameters.items()) if not p.requires_grad
        }
        digest = hashlib.sha256()
        for name, parameter in frozen.items():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            tensor = whole.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        if frozen:
            hashes[part] = digest.hexdigest()
    return hashes


def check_fits(model: MultimodalLM, weights: Mapping[str, Tensor], frozen: dict[str, str]) -> None:
    """Raises DataError with the part whose weights are missing, or whose frozen weights are not
    those of the training."""
    if missing := [name for name in kept_names(model) if name not in weights]:
        raise DataError(
            f"the checkpoint has no weights for {part_of(missing[0])}: {missing[0]} and "
            f"{len(missing) - 1} more"
        )
    known = set(model.state_dict())
    if extra := [name for name in weights if name not in known]:
        raise DataError(
            f"the checkpoint has weights that the model lacks: {extra[0]} and {len(extra) - 1} more"
        )
    found = frozen_hashes(model) if frozen else {}
    if wrong := [part for part in sorted({*frozen, *found}) if frozen.get(part) != found.get(part)]:
        raise DataError(
            f"the frozen weights of {', '.join(wrong)} are not those that the checkpoint was "
            "trained with; "
            "give back the same pretrained weights, init_from, seed and adapters"
        )


def part_of(name: str) -> str:
    """The part in whose module a parameter lies."""
    return name.partition(".")[0]


def weights_in(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state of the model, by its own names."""
    return {
        name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()
    }


def read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """A checkpoint's weights by the model's names, those of a file (mapped into memory) or of a
    folder of shards (read); and its `global_step` and `frozen`. Raises DataError for a file that is
    none."""
    with checkpoint_errors(path):
        if path.is_dir():
            weights = read_shards(path)
            rest = torch.load(path / META, map_location="cpu", weights_only=True)
        else:
            rest = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = weights_in(rest)
        return weights, {
            name: rest[name] for name in ("global_step", "frozen", "new_tokens") if name in rest
        }


def take(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the model the weights that it has a place for.

    Raises DataError where one has another shape.
    """
    for name, tensor in model.state_dict().items():
        if name not in weights:
            continue
        found, expected = tuple(weights[name].shape), tuple(tensor.shape)
        if found != expected:
            raise DataError(
                f"the checkpoint has {name} with shape {found}, and the model needs {expected}"
            )
        tensor.copy_(weights[name])


def needs_base(path: Path) -> bool:
    """Whether a model needs the weights that the run started from, since some stayed frozen and
    are not in the checkpoint."""
    return path.is_dir() or bool(read(path)[1].get("frozen"))
