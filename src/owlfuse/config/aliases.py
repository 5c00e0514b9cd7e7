"""Old names of what has moved. Runs and exports record their parts by name, and are read for years.

An entry stays for one release after the move.
"""

from __future__ import annotations

from typing import Any

MOVED = {
    "owlfuse.adapters.": "owlfuse.model.adapters.",
    "owlfuse.checkpoints.": "owlfuse.training.checkpoints.",
    "owlfuse.connectors.": "owlfuse.model.connectors.",
    "owlfuse.data.shapes.write_shapes": "owlfuse.data.shapes.write.write_shapes",
    "owlfuse.data.shapes_many.write_many": "owlfuse.data.shapes.many.write_many",
    "owlfuse.data.video.": "owlfuse.data.media.video.",
    "owlfuse.evaluation.Evaluation": "owlfuse.evaluation.validation.Evaluation",
    "owlfuse.fusion.": "owlfuse.model.fusion.",
    "owlfuse.llm.": "owlfuse.model.llm.",
    "owlfuse.optim.": "owlfuse.training.optim.",
    "owlfuse.parallel.Replicated": "owlfuse.parallel.strategies.Replicated",
    "owlfuse.parallel.Sharded": "owlfuse.parallel.strategies.Sharded",
    "owlfuse.released.vision.": "owlfuse.artifacts.released.vision.",
    "owlfuse.vision.TimmBackbone": "owlfuse.model.vision.backbone.TimmBackbone",
    "package:owlfuse/data/everyday/": "package:owlfuse/data/shapes/everyday/",
}
"""What a name or a packaged file began with, and what it begins with now."""


def with_current_names(value: Any) -> Any:
    """Return a copy of a configuration in which what has moved is named as it is today.

    Args:
        value: nested dictionaries and lists; of texts, those that begin as an entry of `MOVED`
            does are changed.
    """
    if isinstance(value, dict):
        return {key: with_current_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_current_names(item) for item in value]
    if isinstance(value, str):
        for old, new in MOVED.items():
            if value.startswith(old):
                return new + value.removeprefix(old)
    return value
