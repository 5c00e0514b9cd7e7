"""Builds objects from nodes of the configuration."""

from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf


def build(node: Any, **supplied: Any) -> Any:
    """Return what a node's `_target_` makes of its arguments and those supplied, as plain Python
    containers.

    Errors are the target's own, not Hydra's about them.
    """
    try:
        return instantiate(node, _convert_="all", **supplied)
    except InstantiationException as error:
        cause: BaseException = error
        # Nested targets wrap the error once a level.
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def to_dict(config: Any) -> dict[str, Any]:
    """Return the content of a mapping of OmegaConf, interpolations resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
