"""The weights in a checkpoint: trained parameters, buffers and a hash of the frozen parameters; and
loading them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from owlfuse.artifacts.checking import error_reason
from owlfuse.core.errors import DataError
from owlfuse.model.adapters import PARTS, is_saved_start
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.parallel.checkpoints import META, read_shards
from owlfuse.parallel.collectives import full_tensor

HALVES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""The dtype of all weights by Lightning's precisions in which they have half of float32's bits."""


def set_precision(model: MultimodalLM, precision: Any) -> None:
    """Casts a model that was built in float32 to the one dtype of a run's precision, where it
    has one."""
    if precision in HALVES:
        # cast after it was built in float32, so that random weights are those of a float32 run
        model.to(HALVES[precision])
        model.llm.config.dtype = HALVES[precision]  # by which an export is read back


def check_trained_precision(
    model: MultimodalLM, precision: Any, new_tokens: dict[str, int]
) -> None:
    """Checks that a run which is not in 16 bits as a whole trains no weight that is: its small
    steps would be rounded away, since no 32-bit copy of it is kept. The model may have no memory.

    Args:
        new_tokens: those whose rows of the LLM's tables are trained (see
            `adapters.apply_adapters`).

    Raises:
        ValueError: it does, by `model.llm.dtype`.
    """
    if precision in HALVES:
        return
    for name in PARTS:
        part = model.part(name)
        trained = {key: p for key, p in part.parameters.items() if p.requires_grad}
        if new_tokens:
            trained |= part.tables
        halves = [key for key, parameter in trained.items() if parameter.dtype in HALVES.values()]
        if halves:
            raise ValueError(
                f"model.llm.dtype: {halves[0]} of the part {name} would be trained in 16 bits, in "
                "which small steps are rounded away; leave dtype out (bf16-mixed computes in 16 "
                "bits all the same), train the part by lora, or everything in 16 bits by "
                "trainer.precision=bf16-true"
            )


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turns what reading a checkpoint raises into a DataError that names it: a file that is
    damaged, or that holds code."""
    try:
        yield
    # weights_only refuses anything but tensors and plain values
    except UnpicklingError as error:
        raise DataError(
            f"checkpoint {path} holds more than tensors and plain values, and its code was not run"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"checkpoint {path} is no checkpoint of a run: {error_reason(error)}"
        ) from error


def saved_names(model: nn.Module) -> list[str]:
    """Returns the names of the state that a checkpoint holds: trained parameters, what their
    updates started from, and persistent buffers. The scales of weights in 4 bits, which are neither
    parameters nor buffers, belong to what is frozen."""
    # a tied parameter has several names
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = []
    for name in model.state_dict():
        is_trained = name in parameters and parameters[name].requires_grad
        if is_trained or name in buffers or is_saved_start(name):
            names.append(name)
    return names


def frozen_hashes(model: MultimodalLM) -> dict[str, str]:
    """Returns sha256 over names, shapes, types and bytes of the frozen parameters, by part; parts
    without any are left out."""
    hashes = {}
    for part in PARTS:
        digest = hashlib.sha256()
        any_frozen = False
        for name, parameter in sorted(model.part(part).parameters.items()):
            if parameter.requires_grad or is_saved_start(name):
                continue
            any_frozen = True
            tensor = full_tensor(parameter).detach().cpu().contiguous()
            # bytes alone would not tell a transposed matrix
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            # as bytes, since numpy has no bfloat16
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
            # of 4 bits the scales are beside the tensor
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                digest.update(state.absmax.cpu().flatten().view(torch.uint8).numpy().data)
        if any_frozen:
            hashes[part] = digest.hexdigest()
    return hashes


def check_fits(model: MultimodalLM, weights: Mapping[str, Tensor], frozen: dict[str, str]) -> None:
    """Raises DataError with the part whose weights are missing, or whose frozen weights are not
    those of the training."""
    if missing := [name for name in saved_names(model) if name not in weights]:
        raise DataError(
            f"the checkpoint has no weights for {missing[0].partition('.')[0]}: {missing[0]} and "
            f"{len(missing) - 1} more"
        )
    state = model.state_dict()
    # another architecture, of which only a part would be loaded
    if extra := [name for name in weights if name not in state]:
        raise DataError(
            f"the checkpoint has weights that the model lacks: {extra[0]} and {len(extra) - 1} more"
        )
    hashes = frozen_hashes(model) if frozen else {}
    changed = [part for part in PARTS if frozen.get(part) != hashes.get(part)]
    if changed:
        raise DataError(
            f"the frozen weights of {', '.join(sorted(changed))} are not those that the checkpoint "
            "was trained with; give back the same pretrained weights, init_from, seed and adapters"
        )


def model_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state of the model in a checkpoint of Lightning's, by the model's own names."""
    state = {}
    for name, tensor in checkpoint["state_dict"].items():
        state[name.removeprefix("model.")] = tensor
    return state


def read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Returns a checkpoint's weights by the model's names, those of a file (mapped into memory) or
    of a folder of shards (read); and its `global_step`, `frozen` and `new_tokens`. Raises DataError
    for a file that is no checkpoint."""
    with checkpoint_errors(path):
        if path.is_dir():
            weights = read_shards(path)
            content = torch.load(path / META, map_location="cpu", weights_only=True)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = model_state(content)
        names = ("global_step", "frozen", "new_tokens")
        return weights, {name: content[name] for name in names if name in content}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into the model, those that it has.

    Raises DataError where one has another shape.
    """
    for name, tensor in model.state_dict().items():
        if name not in weights:
            continue
        shape, expected = tuple(weights[name].shape), tuple(tensor.shape)
        if shape != expected:
            raise DataError(
                f"the checkpoint has {name} with shape {shape}, and the model needs {expected}"
            )
        # in place: tied parameters and optimizers keep theirs
        tensor.copy_(weights[name])


def needs_base(path: Path) -> bool:
    """Returns whether a model needs the weights that the run started from, since some stayed frozen
    and are not in the checkpoint."""
    return path.is_dir() or bool(read(path)[1].get("frozen"))
