"""Fingerprints of the weights that a run starts from, and the files that decide what a model
computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from owlfuse.config.check import nodes_of
from owlfuse.core.files import fingerprint
from owlfuse.core.hub_access import resolved_file
from owlfuse.core.packages import packaged
from owlfuse.model.vision.body import hub_name_of


def weights_identity(config: dict[str, Any]) -> dict[str, str]:
    """Returns fingerprints of what a run starts from, by the keys that name it: `init_from`, and
    the parts' own weights. Files count by their contents, the hub's by the commit that its name
    stands for today, in the hub or else in the cache; what is in neither is left out."""
    llm = config["model"]["llm"]
    backbones = {}
    # the backbone, and those that it is made of
    for path, node in nodes_of(config["model"]["vision"], "model.vision"):
        if path == "model.vision" or "_target_" in node:
            backbones[path] = node
    sources = {"init_from": config.get("init_from"), "model.llm.pretrained": llm.get("pretrained")}
    for path, node in backbones.items():
        sources[f"{path}.weights"] = node.get("weights")
    identities = {}
    for key, source in sources.items():
        if not isinstance(source, str):
            continue
        if files := model_files(Path(packaged(source)).expanduser()):
            identities[key] = fingerprint(files)
        # no file of this machine: a name of the hub
        elif key == "model.llm.pretrained" and (commit := hub_commit(source, LLM_FILES)):
            identities[key] = commit
    for path, node in backbones.items():
        # timm's weights may change under the same name
        if node.get("pretrained") is True:
            name = hub_name_of(str(node.get("name")), {})
            if name and (commit := hub_commit(name, TIMM_FILES)):
                identities[f"{path}.pretrained"] = commit
    return identities


LLM_FILES = ("config.json",)
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""Of the hub's repository of a timm model, the file that timm loads: the first that is there."""


def hub_commit(name: str, files: tuple[str, ...]) -> str | None:
    """Returns `hub:` and the commit at which the hub's name has the first of `files` that it has,
    None where there is none."""
    path = resolved_file(name, files)
    return f"hub:{path.parent.name}" if path else None  # the cache has snapshots/<commit>/<file>


MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.pt",
    "*.pth",
    "config.json",
    "adapter/*.safetensors",
    "adapter/*.json",
)
"""Patterns of the files of a folder that decide what a model computes."""
ANSWER_FILES = (*MODEL_FILES, "*.json", "*.jinja", "*.model")
"""Patterns of those that decide what it answers: also its tokenizer, its chat template, and how it
generates."""


def model_files(path: Path, patterns: tuple[str, ...] = MODEL_FILES) -> list[Path]:
    """Returns the file at a path, or those of a folder that match a pattern."""
    if path.is_file():
        return [path]
    files: set[Path] = set()
    if path.is_dir():
        for pattern in patterns:
            files.update(path.glob(pattern))
    return sorted(files)
