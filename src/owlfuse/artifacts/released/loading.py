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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from owlfuse.artifacts.checking import build_errors, check_counts
from owlfuse.artifacts.released.names import (
    TensorMapping,
    optional_name,
    tensor_mappings,
    unused_names,
)
from owlfuse.artifacts.released.nodes import family_of, nodes_of
from owlfuse.artifacts.released.weights import FLOATS, Checkpoint
from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_json
from owlfuse.core.folder_kinds import check_released
from owlfuse.model.multimodal import MultimodalLM, assemble

JSON_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")

ORIGINAL_TENSORS = "kept.safetensors"
"""The file of `Released.original_tensors` in an export."""


@dataclass
class Released:
    """What is needed to write a model in the layout of the folder that it was loaded from, as
    `model.released`."""

    family: str
    """owl1, owl2, owl3 or llava."""
    config: dict[str, Any]
    """config.json."""
    image_token_id: int | None
    """The token that stands for an image in mPLUG-Owl3 and LLaVA, where config.json says it."""
    dtypes: dict[str, torch.dtype | None]
    """The type of each tensor of the folder by name; None for one that is no floating-point
    number, and is written as it was."""
    shapes: dict[str, tuple[int, ...]]
    """Each tensor's shape."""
    original_tensors: Mapping[str, Tensor] = field(repr=False)
    """Tensors that the model does not use, and those whose numbers its type does not hold."""
    files: dict[str, bytes] = field(repr=False)
    """Those of JSON_FILES that there are, byte for byte."""


def load(folder: Path | str) -> MultimodalLM:
    """Returns the model of a folder in the layout of mPLUG-Owl1, mPLUG-Owl2, mPLUG-Owl3 or LLaVA
    1.5 (`llava-hf/llava-1.5-7b-hf`), in eval mode on the CPU.

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
    # first, since the other checks depend on it
    family = family_of(folder, config)
    checkpoint = Checkpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    check_counts(config, folder / "config.json", shapes)
    dtype = common_dtype(checkpoint)
    dtype_name = str(dtype).removeprefix("torch.")
    # numbers that make no model fail anywhere inside timm and transformers
    with build_errors(folder / "config.json"):
        nodes = nodes_of(folder, family, config, set(shapes), dtype_name)
        # on meta: memory is taken once, in the weights' own type
        with init_empty_weights(include_buffers=False):
            model = assemble(nodes, nodes["llm"]["config"]["vocab_size"])
        model.llm.tie_weights()  # accelerate has untied them
    mappings = tensor_mappings(model, family, shapes)
    ignored = unused_names(family, nodes["vision"]["kwargs"]["depth"])
    # all differences are told together, and before any memory is taken
    check_tensors(folder, checkpoint, mappings, ignored, optional_name(model, family))
    allocate(model, dtype)
    model.released = Released(
        family,
        config,
        config.get("image_token_id", config.get("image_token_index")),
        dtypes={name: FLOATS.get(info.dtype) for name, info in checkpoint.tensors.items()},
        shapes=shapes,
        original_tensors=load_tensors(folder, model, checkpoint, mappings, dtype),
        files={
            name: (folder / name).read_bytes() for name in JSON_FILES if (folder / name).exists()
        },
    )
    return model.eval()


def common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the type that most numbers of the files have. Raises DataError where none is a
    floating-point number."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOATS:
            counts[info.dtype] += prod(info.shape)
    if not counts:
        files = ", ".join(str(file) for file in checkpoint.files)
        raise DataError(
            f"{files}: no tensor of {', '.join(FLOATS)}; weights of a quantised model cannot be "
            "read"
        )
    return FLOATS[counts.most_common(1)[0][0]]


def check_tensors(
    folder: Path,
    checkpoint: Checkpoint,
    mappings: dict[str, TensorMapping],
    ignored: re.Pattern[str],
    optional: str | None,
) -> None:
    """Raises DataError with every tensor that is missing, of another shape or type, or left over.

    Args:
        ignored: names that need not be there and are not read.
        optional: a name that need not be there, but is read.
    """
    problems = []
    for name, mapping in mappings.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            if name != optional:
                problems.append(f"{name} is missing, expected {mapping.shape}")
        elif info.shape != mapping.shape:
            problems.append(f"{name} has shape {info.shape}, expected {mapping.shape}")
        elif info.dtype not in FLOATS:
            problems.append(
                f"{name} in {info.file.name} is {info.dtype}, expected one of {', '.join(FLOATS)}"
            )
    for name, info in checkpoint.tensors.items():
        if name not in mappings and not ignored.fullmatch(name):
            problems.append(f"{name} is left over with shape {info.shape}, expected none")
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
    # by the parameter that they replace, so that tied ones stay tied
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    saved = set(model.state_dict())
    # torch's own tables of a module: setattr would untie what two modules share
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in replacements:
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    replacements[parameter] = nn.Parameter(empty)
                module._parameters[name] = replacements[parameter]
        for name, buffer in module._buffers.items():
            if f"{prefix}.{name}" in saved and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


@torch.no_grad()
def load_tensors(
    folder: Path,
    model: MultimodalLM,
    checkpoint: Checkpoint,
    mappings: dict[str, TensorMapping],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Copies the folder's tensors into the model. Returns copies of those that the model cannot
    give back.

    Raises:
        DataError: tensors which are one in the model and differ: tied embeddings, or the position
            tables of mPLUG-Owl2's layers.
    """
    state = model.state_dict()
    original_tensors: dict[str, Tensor] = {}
    loaded_views: dict[tuple, str] = {}
    for name, tensor in checkpoint.read():
        mapping = mappings.get(name)
        if mapping is None:
            original_tensors[name] = tensor.clone()
            continue
        parameter = state[mapping.name]
        cast = tensor.to(dtype)
        view = mapping.view(parameter)
        key = (view.data_ptr(), view.shape)
        # by memory, since several names may be views of one tensor
        if key not in loaded_views:
            loaded_views[key] = name
            mapping.write(parameter, tensor)
        elif not torch.equal(mapping.read(parameter), cast):
            raise DataError(
                f"{folder}: {loaded_views[key]} and {name} differ, and are one tensor in the "
                "model; make them equal"
            )
        # numbers that the model's type rounds cannot be written again from the model
        if cast.dtype != tensor.dtype and not torch.equal(cast.to(tensor.dtype), tensor):
            original_tensors[name] = tensor.clone()
    return original_tensors


def read_record(folder: Path) -> Released:
    """Returns what `write_record` wrote. Raises DataError where it is damaged."""
    try:
        fields = read_json(folder / "record.json")
        names = fields.pop("files")
        # a name such as ../x would be read outside of the folder
        if strange := set(names) - set(JSON_FILES):
            raise ValueError(f"it names {min(map(str, strange))[:80]}")
        files = {name: (folder / name).read_bytes() for name in names}
        tensor_file = folder / ORIGINAL_TENSORS
        original_tensors = load_file(tensor_file) if tensor_file.exists() else {}
        for name, dtype in fields["dtypes"].items():
            fields["dtypes"][name] = dtype and getattr(torch, dtype)
        fields["shapes"] = {name: tuple(shape) for name, shape in fields["shapes"].items()}
        return Released(
            **fields,
            config=json.loads(files["config.json"]),
            original_tensors=original_tensors,
            files=files,
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise DataError(
            f"{folder} is damaged ({error}); import the released folder anew"
        ) from error
