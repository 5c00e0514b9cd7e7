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
"""Where weights lie, the first that is there."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: str
    """As safetensors calls it: F32, BF16, I64, ..."""
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder; none is in memory.

    Attributes:
        tensors: what is in the files, by name.

    Raises:
        DataError: no weights, or a file that is missing, damaged or no file of tensors; it is
            named.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in stored_in(file):
                if name in self.tensors:
                    raise DataError(
                        f"{file} holds {name}, and so does {self.tensors[name].file.name}; take "
                        "one of them away"
                    )
                self.tensors[name] = stored

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file, mapped and not yet read from the disk."""
        for file in self.files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        yield name, opened.get_tensor(name)
            else:
                yield from unpickled(file).items()


def weight_files(folder: Path) -> list[Path]:
    """The one file, or the shards that an index names. Raises DataError where one is missing."""
    found = next((folder / name for name in SOURCES if (folder / name).exists()), None)
    if found is None:
        raise DataError(
            f"{folder} has no weights; put {', '.join(SOURCES[:3])} or {SOURCES[3]} there"
        )
    if found.suffix != ".json":
        return [found]
    listed = read_json(found, limit=MAX_JSON).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(name, str) for name in listed.values())
    ):
        raise DataError(f"{found} has no weight_map of tensors to files; copy it anew")
    names = sorted(set(listed.values()))
    if gone := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise DataError(
            f"{found} names {', '.join(gone)}, and {folder} does not hold it; copy the missing "
            "shards there"
        )
    return [folder / name for name in names]


def stored_in(file: Path) -> list[tuple[str, Stored]]:
    """Name, type and shape of a file's tensors.

    Raises DataError for a damaged file, or one with more than tensors.
    """
    if file.suffix != ".safetensors":
        kinds = {dtype: name for name, dtype in FLOATS.items()}
        return [
            (name, Stored(file, kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)))
            for name, tensor in unpickled(file).items()
        ]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [
                (name, Stored(file, part.get_dtype(), tuple(part.get_shape())))
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} is damaged or cut off ({one_line(error)}); copy it anew"
        ) from error


def unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, mapped.

    Raises DataError for one with code in it, a damaged one, or one of the old format.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} holds more than tensors, and its code was not run; get the model as "
            "safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = one_line(error)
        raise DataError(
            f"{file} is damaged or no zip of torch.save ({reason}); copy it anew or get safetensors"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise DataError(f"{file} is no dictionary of tensors by name; get the model as safetensors")
    return found


def one_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return " ".join(str(error).split())[:120]
