"""Tensors in files, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from owlfuse.types import DataError

MAPPED = 64 * 2**20
"""Bytes of a file that are read before it is mapped anew: what was read stays in a process's memory as long as its map."""


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turns what reading a checkpoint raises into a DataError that names it: a file that is damaged, or that holds code."""
    try:
        yield
    except UnpicklingError as error:
        raise DataError(f"checkpoint {path} holds more than tensors and plain values, and its code was not run") from error
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"checkpoint {path} is no checkpoint of a run: {reason or type(error).__name__}") from error


class Pickled(Mapping[str, Tensor]):
    """The tensors of a file of torch.save by name, mapped from the disk: read when they are used, and not to be written into.

    Args:
        key: of the file's dictionary, where the tensors are not at its top.
        prefix: before their names there.

    Raises:
        What torch.load raises for a file that is damaged, or holds more than tensors and plain values.
    """

    def __init__(self, path: Path, key: str | None = None, prefix: str = "") -> None:
        self.path, self.key, self.prefix = path, key, prefix
        self.content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.names = [name.removeprefix(prefix) for name in self.tensors()]
        self.known = set(self.names)
        self.given = 0

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as they are mapped now."""
        return self.content if self.key is None else self.content[self.key]

    def __getitem__(self, name: str) -> Tensor:
        if self.given > MAPPED:
            self.content = None  # the old map goes first
            self.content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            self.given = 0
        tensor = self.tensors()[self.prefix + name]
        self.given += tensor.nbytes
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.known

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Safe(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each mapped from the disk when it is asked for.

    Raises:
        What safetensors raises for a file that is damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dictionary
                    self.files[name] = path
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as opened:
            return opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
