"""Safetensors written one tensor at a time, so that a model need not be in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from owlfuse.types import DataError

FORMAT = {"format": "pt"}
TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""What safetensors calls torch's types, those that come first last in a file."""


def write_file(path: Path, shapes: Mapping[str, Tensor], load: Callable[[str], Tensor]) -> None:
    """Writes the file that `safetensors.torch.save_file` would, byte for byte: its length, a header in JSON, the tensors.

    Args:
        shapes: tensors by name, which need no memory.
        load: gives what the tensor of a name holds, of the same shape and type.

    Raises:
        DataError: a type that is none of TYPES.
    """
    kinds = list(TYPES)
    if strange := [f"{name} is {tensor.dtype}" for name, tensor in shapes.items() if tensor.dtype not in TYPES]:
        raise DataError(f"{path.name}: {', '.join(strange)}; weights are numbers of {', '.join(TYPES.values())}")
    names = sorted(shapes, key=lambda name: (-kinds.index(shapes[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": FORMAT}
    end = 0
    for name in names:
        begin, end = end, end + shapes[name].nbytes
        header[name] = {"dtype": TYPES[shapes[name].dtype], "shape": list(shapes[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(bytes_of(load(name), shapes[name], name))


def bytes_of(tensor: Tensor, like: Tensor, name: str) -> Any:
    """A tensor's numbers as they lie in memory. Raises DataError where it is not as `like`."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        found, wanted = (f"{tuple(x.shape)} of {x.dtype}" for x in (tensor, like))
        raise DataError(f"{name} is {found}, expected {wanted}")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def write_weights(
    folder: Path,
    shapes: dict[str, Tensor],
    load: Callable[[str], Tensor],
    max_shard_size: str,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes model.safetensors, or over `max_shard_size` shards and the index of them, as huggingface_hub divides them.

    Args:
        shapes, load: see `write_file`.
        metadata: what the index says besides the size.
    """
    without_memory = {name: torch.empty_like(tensor, device="meta") for name, tensor in shapes.items()}
    split = split_torch_state_dict_into_shards(
        without_memory, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: shapes[name] for name in names}, load)
    if split.is_sharded:
        index = {"metadata": {**(metadata or {}), **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
