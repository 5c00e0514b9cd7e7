"""The models of the demo: loaded once, each with a name of its own and what it is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseProcessor
from owlfuse.artifacts.load import load_with_processor
from owlfuse.config.trust import read_run_config
from owlfuse.core.progress import quiet_libraries
from owlfuse.model.quantization import count_parameters
from owlfuse.serving.chat import Conversation


@dataclass
class DemoModel:
    """A model that answers."""

    name: str
    """The folder's, with as many folders above it as it takes to distinguish it."""
    facts: list[str]
    """What a comparison wants to know: fusion, experiment, parts."""
    model: OwlfuseForConditionalGeneration
    processor: OwlfuseProcessor


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's, and no export."""
    return (folder / "config.yaml").exists()


@quiet_libraries()
def load_models(
    folders: list[Path], report: Callable[[str], None], which: str = "last"
) -> list[DemoModel]:
    """Return every model, on the GPU where there is one, after a first token. Raises as
    `load_with_processor`.

    Args:
        report: gets a line before each is loaded, and one after it.
        which: of the runs' checkpoints.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for count, (folder, name) in enumerate(zip(folders, unique_names(folders)), start=1):
        report(f"loading {folder} ({count} of {len(folders)})")
        start = time.perf_counter()
        # An exported folder has no checkpoints to choose from, and may stand beside a run.
        has_choice = is_run(folder) or not any(map(is_run, folders))
        model, processor = load_with_processor(folder, which if has_choice else "last")
        model.to(device)  # type: ignore[arg-type]  # lost in transformers' wrapper
        # The first answer is a slow one: no visitor waits for it.
        Conversation(model, processor, max_new_tokens=1).ask("Hello", lambda text: None)
        models.append(DemoModel(name, describe(folder, model), model, processor))
        # Two weights in 4 bits share a byte, so numel() would give half of them.
        size = count_parameters(model)
        seconds = time.perf_counter() - start
        report(f"  {name}: {size:,} parameters on {device}, {seconds:.1f} s")
    return models


def unique_names(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from each other: `a/out` and `b/out`, but
    `owl1` and `owl3`."""
    paths = [folder.resolve().parts for folder in folders]
    names = []
    for parts in paths:
        depth = 1  # parts of the path, from its end
        while depth < len(parts):
            ends = [path[-depth:] for path in paths]
            if ends.count(parts[-depth:]) == 1:
                break
            depth += 1
        names.append("/".join(parts[-depth:]))
    return names


def describe(folder: Path, model: OwlfuseForConditionalGeneration) -> list[str]:
    """Return the experiment or where the model is from, its fusion and its parts, in a few words
    each."""
    inner = model.model
    configs: dict[str, Any] = inner.nodes or {}  # none of a model that was put together by hand
    vision = (configs.get("vision") or {}).get("name", type(inner.vision).__name__)
    connector = type(inner.connector).__name__
    llm = getattr(inner.llm.config, "model_type", type(inner.llm).__name__)
    fusion = type(inner.fusion).__name__
    if gate := (configs.get("fusion") or {}).get("gate"):
        fusion += f" ({gate})"
    return [f"fusion: {fusion}", origin(folder, model), f"{vision}, {connector}, {llm}"]


def origin(folder: Path, model: OwlfuseForConditionalGeneration) -> str:
    """Return the experiment of a run, and what wrote another folder."""
    if is_run(folder):
        return f"experiment: {read_run_config(folder).get('experiment') or 'none'}"
    released = model.model.released
    if released:
        return f"imported {released.family}"
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("From "):
                return f"export of {line.removeprefix('From ').removesuffix('.')}"
    return "an export"
