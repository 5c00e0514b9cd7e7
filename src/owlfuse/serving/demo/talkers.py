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
from owlfuse.artifacts.load import load_talker
from owlfuse.config.trust import read_run_config
from owlfuse.core.progress import quiet_libraries
from owlfuse.serving.chat import Conversation


@dataclass
class Talker:
    """A model that answers."""

    name: str
    """The folder's, with as many folders above it as it takes to tell it from the others."""
    facts: list[str]
    """What a comparison wants to know: fusion, experiment, parts."""
    model: OwlfuseForConditionalGeneration
    processor: OwlfuseProcessor


@quiet_libraries()
def load_talkers(
    folders: list[Path], say: Callable[[str], None], which: str = "last"
) -> list[Talker]:
    """Every model, on the GPU where there is one, after a first token. Raises as `load_talker`.

    Args:
        say: gets a line before each is loaded, and one after it.
        which: of the runs' checkpoints.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    talkers = []
    for count, (folder, name) in enumerate(zip(folders, distinct(folders)), start=1):
        say(f"loading {folder} ({count} of {len(folders)})")
        start = time.perf_counter()
        model, processor = load_talker(
            folder, which if (folder / "config.yaml").exists() else "last"
        )
        model.to(device)  # type: ignore[arg-type]  # lost in transformers' wrapper
        # the first answer is a slow one
        Conversation(model, processor, max_new_tokens=1).ask("Hello", lambda text: None)
        talkers.append(Talker(name, facts_of(folder, model), model, processor))
        size = sum(p.numel() for p in model.parameters())
        say(f"  {name}: {size:,} parameters on {device}, {time.perf_counter() - start:.1f} s")
    return talkers


def distinct(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other:

    `a/out` and `b/out`, but `owl1` and `owl3`.
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(own[-depth:]))
    return names


def facts_of(folder: Path, model: OwlfuseForConditionalGeneration) -> list[str]:
    """The experiment or where the model is from, its fusion and its parts, in a few words each."""
    inner = model.model
    nodes: dict[str, Any] = inner.nodes or {}
    gate = (nodes.get("fusion") or {}).get("gate")
    vision = (nodes.get("vision") or {}).get("name", type(inner.vision).__name__)
    fusion = type(inner.fusion).__name__ + (f" ({gate})" if gate else "")
    llm = getattr(inner.llm.config, "model_type", type(inner.llm).__name__)
    return [
        f"fusion: {fusion}",
        origin(folder, model),
        f"{vision}, {type(inner.connector).__name__}, {llm}",
    ]


def origin(folder: Path, model: OwlfuseForConditionalGeneration) -> str:
    """The experiment of a run; of another folder, what wrote it."""
    if (folder / "config.yaml").exists():
        return f"experiment: {read_run_config(folder).get('experiment') or 'none'}"
    released = model.model.released
    if released:
        return f"imported {released.family}"
    card = folder / "README.md"
    lines = (
        card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    )
    source = next((line for line in lines if line.startswith("From ")), "")
    return f"export of {source.removeprefix('From ').removesuffix('.')}" if source else "an export"
