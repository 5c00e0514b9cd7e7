"""A released folder as a `MultimodalLM`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from owlfuse.artifacts.checking import check_counts
from owlfuse.artifacts.released.names import Place, optional, places_of, unused
from owlfuse.artifacts.released.nodes import family_of, nodes_of
from owlfuse.artifacts.released.weights import FLOATS, Checkpoint, one_line
from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_json
from owlfuse.core.folder_kinds import check_released
from owlfuse.model.multimodal import MultimodalLM, assemble

KEPT_FILES = ("config.json", "preprocessor_config.json")


@dataclass
class Released:
    """What a model that was loaded from a released folder remembers of it, as `model.released`."""

    family: str
    """owl1, owl2 or owl3."""
    config: dict[str, Any]
    """config.json."""
    image_token_id: int | None
    """The token that stands for an image in mPLUG-Owl3, where config.json says it."""
    dtypes: dict[str, torch.dtype | None]
    """Each tensor of the folder by name, and its type; None for one that is kept as it was."""
    shapes: dict[str, tuple[int, ...]]
    """Each tensor's shape."""
    kept: Mapping[str, Tensor] = field(repr=False)
    """Tensors that the model does not use, and those whose numbers its type does not hold."""
    files: dict[str, bytes] = field(repr=False)
    """config.json, and preprocessor_config.json where there is one, byte for byte."""


def load(folder: Path | str) -> MultimodalLM:
    """The model of a folder in the layout of mPLUG-Owl1, mPLUG-Owl2 or mPLUG-Owl3, in eval mode on
    the CPU.

    Parameters have the type that most numbers of the weights have (float64, float32, bfloat16 or
    float16), one type for the whole model even where the file mixes types. They are copied from the
    mapped files one by one, so that no more than the model and one shard is in memory.
    `model.nodes` holds the parts' configuration, `model.released` what `save` needs besides.

    Raises:
        DataError: a file that is missing or damaged, another model, or tensors that do not fit
            config.json: all of them are listed, with the shapes found and expected.
    """
    folder = check_released(Path(folder))
    config = read_json(folder / "config.json", limit=MAX_CONFIG)
    family = family_of(folder, config)
    checkpoint = Checkpoint(folder)
    check_counts(
        config,
        folder / "config.json",
        {name: stored.shape for name, stored in checkpoint.tensors.items()},
    )
    dtype = common_dtype(folder, checkpoint)
    try:
        nodes = nodes_of(
            folder, family, config, set(checkpoint.tensors), str(dtype).removeprefix("torch.")
        )
        with init_empty_weights(include_buffers=False):
            model = assemble(nodes, nodes["llm"]["config"]["vocab_size"])
        model.llm.tie_weights()  # accelerate has untied them
    except DataError:
        raise
    # numbers that make no model fail anywhere inside timm and transformers
    except Exception as error:
        raise DataError(
            f"{folder / 'config.json'} describes no model ({one_line(error)}); take that of the "
            "weights"
        ) from error
    places = places_of(model, family)
    ignored = unused(family, nodes["vision"]["kwargs"]["depth"])
    check(folder, checkpoint, places, ignored, optional(model, family))
    allocate(model, dtype)
    kept = fill(folder, model, checkpoint, places, dtype)
    files = {name: (folder / name).read_bytes() for name in KEPT_FILES if (folder / name).exists()}
    dtypes = {name: FLOATS.get(stored.dtype) for name, stored in checkpoint.tensors.items()}
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    model.released = Released(
        family, config, config.get("image_token_id"), dtypes, shapes, kept, files
    )
    return model.eval()


def common_dtype(folder: Path, checkpoint: Checkpoint) -> torch.dtype:
    """The type that most numbers of the folder have."""
    counts: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.dtype in FLOATS:
            counts[stored.dtype] += prod(stored.shape)
    if not counts:
        files = ", ".join(str(file) for file in checkpoint.files)
        raise DataError(
            f"{files}: no tensor of {', '.join(FLOATS)}; weights of a quantised model cannot be "
            "read"
        )
    return FLOATS[counts.most_common(1)[0][0]]


def check(
    folder: Path,
    checkpoint: Checkpoint,
    places: dict[str, Place],
    ignored: re.Pattern[str],
    may_lack: str | None,
) -> None:
    """Raises DataError with every tensor that is missing, of another shape or type, or left over.

    Args:
        ignored: names that need not be there and are not read.
        may_lack: a name that need not be there, but is read.
    """
    problems = []
    for name, place in places.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            if name != may_lack:
                problems.append(f"{name} is missing, expected {place.shape}")
        elif stored.shape != place.shape:
            problems.append(f"{name} has shape {stored.shape}, expected {place.shape}")
        elif stored.dtype not in FLOATS:
            problems.append(
                f"{name} in {stored.file.name} is {stored.dtype}, expected one of "
                f"{', '.join(FLOATS)}"
            )
    for name, stored in checkpoint.tensors.items():
        if name not in places and not ignored.fullmatch(name):
            problems.append(f"{name} is left over with shape {stored.shape}, expected none")
    if problems:
        count = f"{len(problems)} {'tensor does' if len(problems) == 1 else 'tensors do'}"
        raise DataError(
            f"{folder}: {count} not fit config.json: {'; '.join(problems)}. Take config.json and "
            "weights of one model"
        )


@torch.no_grad()
def allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts empty parameters on the CPU for those on the meta device, tied ones tied, and
    position tables in the type."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    saved = set(model.state_dict())
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if f"{prefix}.{name}" in saved and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


@torch.no_grad()
def fill(
    folder: Path,
    model: MultimodalLM,
    checkpoint: Checkpoint,
    places: dict[str, Place],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Copies the folder's tensors into the model. Returns copies of those that the model cannot
    give back.

    Raises:
        DataError: tensors for which the model has one place, and which differ: tied embeddings, or
            the position tables of mPLUG-Owl2's layers.
    """
    state = model.state_dict()
    kept: dict[str, Tensor] = {}
    holders: dict[tuple, str] = {}
    for name, tensor in checkpoint.read():
        place = places.get(name)
        if place is None:
            kept[name] = tensor.clone()
            continue
        ours = state[place.name]
        cast = tensor.to(dtype)
        view = place.part(ours)
        where = (view.data_ptr(), view.shape)
        if where not in holders:
            holders[where] = name
            place.put(ours, tensor)
        elif not torch.equal(place.take(ours), cast):
            raise DataError(
                f"{folder}: {holders[where]} and {name} differ, and are one tensor in the model; "
                "make them equal"
            )
        if cast.dtype != tensor.dtype and not torch.equal(cast.to(tensor.dtype), tensor):
            kept[name] = tensor.clone()
    return kept


def read_record(folder: Path) -> Released:
    """What `write_record` wrote. Raises DataError where it is damaged."""
    try:
        rest = read_json(folder / "record.json")
        names = rest.pop("files")
        if strange := set(names) - set(KEPT_FILES):
            raise ValueError(f"it names {min(map(str, strange))[:80]}")
        files = {name: (folder / name).read_bytes() for name in names}
        kept = (
            load_file(folder / "kept.safetensors") if (folder / "kept.safetensors").exists() else {}
        )
        rest["dtypes"] = {
            name: dtype and getattr(torch, dtype) for name, dtype in rest["dtypes"].items()
        }
        rest["shapes"] = {name: tuple(shape) for name, shape in rest["shapes"].items()}
        return Released(**rest, config=json.loads(files["config.json"]), kept=kept, files=files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder} is damaged ({error}); import the released folder anew"
        ) from error
