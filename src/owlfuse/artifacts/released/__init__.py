"""Released mPLUG-Owl1, 2 and 3 checkpoints in owlfuse, and back.

`load(folder)` gives a `MultimodalLM`, `reference_logits` and `reference_loss` run it on inputs in
the released conventions, and `save(model, folder)` writes the released layout. Their modules are
imported when one is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlfuse.artifacts.released.inputs import reference_logits, reference_loss
    from owlfuse.artifacts.released.loading import Released, load
    from owlfuse.artifacts.released.saving import save

__all__ = ["Released", "load", "reference_logits", "reference_loss", "save"]

MODULES = {
    "load": "loading",
    "Released": "loading",
    "save": "saving",
    "reference_logits": "inputs",
    "reference_loss": "inputs",
}


def __getattr__(name: str) -> Any:
    """The public names."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no {name}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"owlfuse.artifacts.released.{MODULES[name]}"), name)
