"""A configuration as plain dictionaries, lists and values."""

from typing import Any, cast

from omegaconf import OmegaConf


def to_dict(config: Any) -> dict[str, Any]:
    """The content of a mapping of OmegaConf, references resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
