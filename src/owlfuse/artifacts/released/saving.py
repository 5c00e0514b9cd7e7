"""A model that was loaded from a released folder, written in that layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from owlfuse.artifacts.released.loading import Released
from owlfuse.artifacts.released.names import ELSE, Place, family_in, optional, places_of
from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_directory
from owlfuse.model.connectors.abstractor import Abstractor
from owlfuse.model.connectors.linear import LinearConnector
from owlfuse.model.connectors.mlp import MLPConnector
from owlfuse.model.fusion.hyperattention import HyperAttention
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.vision.backbone import TimmBackbone


def save(model: MultimodalLM, folder: Path | str, max_shard_size: str = "5GB") -> Path:
    """Writes the released layout: the JSON files of the folder that the model came from byte for
    byte, and its tensors under their names and of their types, with the model's numbers now; in
    shards over a size. It appears whole or not at all.

    Tensors that the model does not use are written as they were, and so are those of another type
    than the model's as long as the model has the numbers that they were rounded to: what was loaded
    and not trained comes back bit for bit.

    Raises:
        FileExistsError: the folder holds something.
        DataError: a part that the family does not have (the message begins with it), or a model
            that came from elsewhere.
    """
    folder = Path(folder).expanduser()
    places = places_in(model)
    released = model.released
    with atomic_directory(folder) as beside:
        for name, content in released.files.items():
            (beside / name).write_bytes(content)
        # Copies, since the writer leaves out tensors that share memory, as tied embeddings do.
        tensors = {name: released_tensor(model, places, name).clone() for name in released.dtypes}
        save_torch_state_dict(tensors, beside, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def released_tensor(model: MultimodalLM, places: dict[str, Place], name: str) -> Tensor:
    """A tensor of the folder by its name there."""
    original = model.released.kept.get(name)
    if name not in places:
        return original
    place = places[name]
    ours = place.take(model.state_dict()[place.name])
    if original is not None and torch.equal(ours.cpu(), original.to(ours.dtype)):
        return original
    return ours.to(model.released.dtypes[name])


CONNECTORS = {"owl1": (Abstractor,), "owl2": (Abstractor,), "owl3": (LinearConnector, MLPConnector)}
LLMS = {"owl1": "llama", "owl2": "llama", "owl3": "qwen2"}


def places_in(model: MultimodalLM) -> dict[str, Place]:
    """Where the released tensors stand in a model that came from a released folder.

    Raises:
        DataError: a part that the family does not have, or another than the folder had (the message
            begins with it), or a model that came from elsewhere.
    """
    released: Released | None = model.released
    family = family_in(model)
    check_fusion(model)
    if released is not None and released.family != family:
        raise DataError(
            f"fusion: {type(model.fusion).__name__} is {family}'s, and the model came from an "
            f"{released.family}"
        )
    for part, kinds in (("vision", (TimmBackbone,)), ("connector", CONNECTORS[family])):
        module = getattr(model, part)
        if not isinstance(module, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{part}: {type(module).__name__}, and {family} has {names}; {ELSE}")
    if model.llm.config.model_type != LLMS[family]:
        raise DataError(
            f"llm: {model.llm.config.model_type}, and {family} has {LLMS[family]}; {ELSE}"
        )
    places = places_of(model, family)
    if released is None:
        raise DataError(
            f"no released {family} folder is known to write like (model.released is None): load "
            f"one; or {ELSE}"
        )
    check_shapes(released, places, optional(model, family))
    return places


def check_fusion(model: MultimodalLM) -> None:
    """Raises DataError for a form of hyperattention that was never released."""
    fusion = model.fusion
    if isinstance(fusion, HyperAttention) and (
        fusion.gate == "none" or fusion.norm != "shared" or not fusion.mi_rope
    ):
        raise DataError(
            f"fusion: gate {fusion.gate}, norm {fusion.norm}, mi_rope {fusion.mi_rope}, and every "
            "released owl3 has a gate, "
            f"the shared norm and MI-RoPE; {ELSE}"
        )


def check_shapes(released: Released, places: dict[str, Place], may_lack: str | None) -> None:
    """Raises DataError where the model has other tensors than the folder that it came from."""
    for name, place in places.items():
        shape = released.shapes.get(name)
        if shape != place.shape and not (shape is None and name == may_lack):
            part, found = (
                place.name.partition(".")[0],
                f"shape {shape}" if shape else "no such tensor",
            )
            raise DataError(
                f"{part}: {name} has shape {place.shape}, and the released folder had {found}; "
                "load the model anew"
            )
    if gone := sorted(set(released.shapes) - set(places) - set(released.kept)):
        part = (
            "vision"
            if "vision_model." in gone[0]
            else "llm"
            if "layers." in gone[0]
            else "connector"
        )
        part = "connector" if "abstractor." in gone[0] else part
        raise DataError(
            f"{part}: the released folder had {', '.join(gone)}, and the model does not; load the "
            "model anew"
        )


def write_record(released: Released, folder: Path) -> None:
    """The released JSON files, the tensors that the model does not use, and each tensor's type
    and shape."""
    folder.mkdir(parents=True)
    for name, content in released.files.items():
        (folder / name).write_bytes(content)
    if released.kept:
        save_file(dict(released.kept), folder / "kept.safetensors", metadata={"format": "pt"})
    rest = {
        name: value
        for name, value in vars(released).items()
        if name not in ("kept", "files", "config")
    }
    rest["dtypes"] = {
        name: dtype and str(dtype).removeprefix("torch.") for name, dtype in released.dtypes.items()
    }
    rest["files"] = sorted(released.files)
    (folder / "record.json").write_text(json.dumps(rest) + "\n")
