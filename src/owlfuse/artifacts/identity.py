"""What the weights that a run starts from are known by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from owlfuse.core.files import fingerprint
from owlfuse.core.hub_access import resolved_file
from owlfuse.core.packages import packaged
from owlfuse.model.vision.body import hub_name_of


def weights_identity(config: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of what a run starts from, by the keys that name it: `init_from`, and the parts'
    own weights. Files count by their contents, the hub's by the commit that its name stands for
    today, in the hub or else in the cache; what is in neither is left out."""
    vision, llm = config["model"]["vision"], config["model"]["llm"]
    named = {"init_from": config.get("init_from"), "model.vision.weights": vision.get("weights")}
    named["model.llm.pretrained"] = llm.get("pretrained")
    found = {}
    for key, place in named.items():
        if not isinstance(place, str):
            continue
        if files := weight_files(Path(packaged(place)).expanduser()):
            found[key] = fingerprint(files)
        elif key == "model.llm.pretrained" and (commit := hub_commit(place, LLM_FILES)):
            found[key] = commit
    if vision.get("pretrained") is True and (known := timm_weights(vision)):
        found["model.vision.pretrained"] = known
    return found


LLM_FILES = ("config.json",)
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""Of the hub's repository of a timm model, the file that timm loads: the first that is there."""


def timm_weights(vision: dict[str, Any]) -> str | None:
    """What the weights that timm has for a backbone's name are known by; None where they are not to
    be had, or lie elsewhere than in a file or on the hub."""
    overlay = (vision.get("kwargs") or {}).get("pretrained_cfg_overlay") or {}
    if overlay.get("file"):
        files = weight_files(Path(overlay["file"]))
        return fingerprint(files) if files else None
    name = hub_name_of(str(vision.get("name")), overlay)
    return hub_commit(name, TIMM_FILES) if name else None


def hub_commit(name: str, files: tuple[str, ...]) -> str | None:
    """`hub:` and the commit at which the hub's name has the first of `files` that it has, None
    where there is none."""
    path = resolved_file(name, files)
    return f"hub:{path.parent.name}" if path else None  # the cache has snapshots/<commit>/<file>


def weight_files(place: Path) -> list[Path]:
    """A file, or what of a folder decides a model."""
    if place.is_file():
        return [place]
    kinds = (
        "*.safetensors",
        "*.bin",
        "*.gguf",
        "*.pt",
        "*.pth",
        "config.json",
        "adapter/*.safetensors",
        "adapter/*.json",
    )
    return sorted(file for kind in kinds for file in place.glob(kind)) if place.is_dir() else []
