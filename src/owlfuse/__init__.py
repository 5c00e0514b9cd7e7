"""owlfuse: experiments on multimodal LLMs of the mPLUG-Owl family.

After `import owlfuse.artifacts.hf`, transformers' Auto classes and pipelines read what `owlfuse
export` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from owlfuse.model.multimodal import MultimodalLM

__version__ = "0.1.0"


def load(folder: str | Path) -> MultimodalLM:
    """The `MultimodalLM` of a folder that `owlfuse export` or `owlfuse import` wrote, in eval mode
    on the CPU, a LoRA adapter applied. Raises DataError (a ValueError) where the folder is no such
    one or damaged."""
    from owlfuse.artifacts.load import load_exported

    return load_exported(Path(folder))[0].model
