"""The files of a released folder: config.json, and tensors by name from safetensors or pickles, one
file or shards.

Tensors are read one by one from mapped files. No code in a pickle is run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from owlfuse.artifacts.checking import error_reason
from owlfuse.core.errors import DataError
from owlfuse.core.files import read_json

MAX_JSON = 64 * 2**20
"""Bytes of a JSON file; the longest are indices of shards."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of weights, as safetensors calls them."""

SOURCES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights; of several the first counts."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, which is not read."""

    file: Path
    dtype: str
    """As safetensors calls it: F32, BF16, I64, ..."""
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder; none is in memory.

    Attributes:
        tensors: of the files, by name.

    Raises:
        DataError: no weights, or a file that is missing, damaged or no file of tensors; it is
            named.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in tensors_in(file).items():
                if name in self.tensors:
                    raise DataError(
                        f"{file} holds {name}, and so does {self.tensors[name].file.name}; take "
                        "one of them away"
                    )
                self.tensors[name] = info

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor by name, file by file, mapped and not yet read from the disk."""
        for file in self.files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        yield name, opened.get_tensor(name)
            else:
                yield from load_pickle(file).items()


def weight_files(folder: Path) -> list[Path]:
    """Returns the one file, or the shards that an index names. Raises DataError where one is
    missing."""
    present = [folder / name for name in SOURCES if (folder / name).exists()]
    if not present:
        raise DataError(
            f"{folder} has no weights; put {', '.join(SOURCES[:3])} or {SOURCES[3]} there"
        )
    source = present[0]
    if source.suffix != ".json":
        return [source]
    names = shard_names(source, MAX_JSON)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"{source} names {', '.join(missing)}, and {folder} does not hold it; copy the missing "
            "shards there"
        )
    return [folder / name for name in names]


def shard_names(index: Path, limit: int) -> list[str]:
    """Returns the files that an index of shards names, each once. Raises DataError for an index
    that names none, or files elsewhere than beside it.

    Args:
        limit: bytes of the index.
    """
    weight_map = read_json(index, limit=limit).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # a name such as ../x is refused: nothing is read outside of the folder
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(
            f"{index}: weight_map: expected the name of a file beside it for each tensor; copy or "
            "export it anew"
        )
    return sorted(set(names))


def tensors_in(file: Path) -> dict[str, TensorInfo]:
    """Returns type and shape of a file's tensors by name.

    Raises DataError for a damaged file, or one with more than tensors.
    """
    if file.suffix == ".safetensors":
        return read_header(file)
    dtype_names = {dtype: name for name, dtype in FLOATS.items()}
    tensors = {}
    for name, tensor in load_pickle(file).items():
        dtype_name = dtype_names.get(tensor.dtype, str(tensor.dtype))
        tensors[name] = TensorInfo(file, dtype_name, tuple(tensor.shape))
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns type and shape of a safetensors file's tensors by name, none of which is read. Raises
    DataError for a file that is missing or damaged."""
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                header = opened.get_slice(name)
                tensors[name] = TensorInfo(file, header.get_dtype(), tuple(header.get_shape()))
    except FileNotFoundError:
        raise DataError(f"{file} is missing; export or copy the folder anew") from None
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} is damaged or cut off ({error_reason(error)}); export or copy it anew"
        ) from error
    return tensors


def load_pickle(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a .bin, mapped.

    Raises DataError for one with code in it, a damaged one, or one of the old format.
    """
    try:
        # only the zip format, which torch writes since 1.6, can be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} holds more than tensors, and its code was not run; get the model as "
            "safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"{file} is damaged or no zip of torch.save ({error_reason(error)}); copy it anew or "
            "get safetensors"
        ) from error
    is_state_dict = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    if not is_state_dict:
        raise DataError(f"{file} is no dictionary of tensors by name; get the model as safetensors")
    return content
