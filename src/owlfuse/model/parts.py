"""What the rest of the code may ask of a backbone or a connector, with defaults, and what a part's
class says of its own options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, get_args

from hydra.utils import get_object
from torch import nn


class ModelPart(nn.Module):
    """The base of backbones and connectors."""

    COMPUTE_ONLY: ClassVar[tuple[str, ...]] = ()
    """Arguments of the class that change how the part computes and not what: a run may go on with
    others, and a model that was exported may be trained with others."""
    ORIGIN: ClassVar[tuple[str, ...]] = ()
    """Arguments that say where the part's weights came from, which count no longer once they are
    loaded."""

    def set_checkpointing(self, enable: bool) -> None:
        """Turns gradient checkpointing on or off.

        Raises:
            ValueError: the part has none, as by default.
        """
        if enable:
            raise ValueError(
                f"gradient_checkpointing: {type(self).__name__} does not support it; leave it false"
            )

    def set_compute_option(self, name: str, value: Any) -> None:
        """Changes one of `COMPUTE_ONLY` of a part that is built already."""
        # an attribute alone would not reach the modules inside
        if name == "gradient_checkpointing":
            self.set_checkpointing(value)
        else:
            setattr(self, name, value)

    def blocks(self) -> list[list[nn.Parameter]]:
        """Returns the parameters of the part's layers, first to last, which the adapter `last_n`
        counts; none by default."""
        return []

    def sharding_units(self) -> list[nn.Module]:
        """Returns the modules that FSDP gathers one after the other; none by default."""
        return []

    def check_training(self, sharded: bool) -> None:
        """Checks that the part can be trained with its options.

        Args:
            sharded: parameters are split over ranks.

        Raises:
            ValueError: it cannot; never by default.
        """


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Puts a part's name before what it refuses with a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError for an argument that is none of the texts of a `Literal`."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def compute_only(node: Mapping[str, Any]) -> frozenset[str]:
    """Returns the options of a node's part that change only how it computes."""
    return frozenset(getattr(get_object(node["_target_"]), "COMPUTE_ONLY", ()))


def loading_options(node: Mapping[str, Any]) -> frozenset[str]:
    """Returns the options of a node's part that say where its weights come from."""
    return frozenset(getattr(get_object(node["_target_"]), "ORIGIN", ()))


def essential(value: Any) -> Any:
    """Returns a value of the configuration without what its parts say of how they compute and where
    their weights come from: two values of which this is equal make the same part."""
    if not isinstance(value, Mapping):
        return value
    # a plain group of keys has no class that could say so
    free = compute_only(value) | loading_options(value) if "_target_" in value else frozenset()
    # nodes may lie inside of nodes, as those of several backbones in one
    return {key: essential(child) for key, child in value.items() if key not in free}
