"""A model that was loaded from a released folder, written in that layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from owlfuse.artifacts.released.loading import ORIGINAL_TENSORS, Released
from owlfuse.artifacts.released.names import (
    OTHER_LAYOUT,
    TensorMapping,
    family_in,
    optional_name,
    tensor_mappings,
)
from owlfuse.artifacts.released.nodes import LLMS
from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_directory
from owlfuse.model.connectors.abstractor import Abstractor
from owlfuse.model.connectors.linear import LinearConnector
from owlfuse.model.connectors.mlp import MLPConnector
from owlfuse.model.fusion.concat import Concat
from owlfuse.model.fusion.hyperattention import HyperAttention
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.vision.backbone import TimmBackbone


def save(model: MultimodalLM, folder: Path | str, max_shard_size: str = "5GB") -> Path:
    """Writes the released layout: the JSON files of the folder that the model came from byte for
    byte, and its tensors under their names and of their types, with the model's numbers now; in
    shards over a size. The write is atomic.

    Tensors that the model does not use are written as they were, and so are those of another type
    than the model's as long as the model has the numbers that they were rounded to: what was loaded
    and not trained comes back bit for bit.

    Raises:
        FileExistsError: the folder holds something.
        DataError: a part that the family does not have (the message begins with it), or a model
            that came from elsewhere.
    """
    folder = Path(folder).expanduser()
    mappings = checked_mappings(model)
    released = model.released
    with atomic_directory(folder) as temporary:
        for name, content in released.files.items():
            (temporary / name).write_bytes(content)
        # copies, since the writer leaves out tensors that share memory, as tied embeddings do
        tensors = {name: released_tensor(model, mappings, name).clone() for name in released.dtypes}
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def released_tensor(model: MultimodalLM, mappings: dict[str, TensorMapping], name: str) -> Tensor:
    """Returns a tensor of the folder by its name there."""
    original = model.released.original_tensors.get(name)
    # a tensor that the model does not use, and cannot give back
    if name not in mappings:
        return original
    mapping = mappings[name]
    tensor = mapping.read(model.state_dict()[mapping.name])
    # not trained since it was rounded: the numbers that the folder had
    if original is not None and torch.equal(tensor.cpu(), original.to(tensor.dtype)):
        return original
    return tensor.to(model.released.dtypes[name])


CONNECTORS = {
    "owl1": (Abstractor,),
    "owl2": (Abstractor,),
    "owl3": (LinearConnector, MLPConnector),
    "llava": (MLPConnector,),
}


def checked_mappings(model: MultimodalLM) -> dict[str, TensorMapping]:
    """Returns the mappings of the tensors of a model that came from a released folder.

    Raises:
        DataError: a part that the family does not have, or another than the folder had (the message
            begins with it), or a model that came from elsewhere.
    """
    released: Released | None = model.released
    # by the fusion as it is now: the user may have replaced a part
    family = family_in(model)
    check_fusion(model.fusion, family)
    if released is not None and released.family != family:
        raise DataError(
            f"fusion: {type(model.fusion).__name__} is {family}'s, and the model came from an "
            f"{released.family}"
        )
    for part, classes in (("vision", (TimmBackbone,)), ("connector", CONNECTORS[family])):
        module = getattr(model, part)
        if not isinstance(module, classes):
            names = " or ".join(part_class.__name__ for part_class in classes)
            raise DataError(
                f"{part}: {type(module).__name__}, and {family} has {names}; {OTHER_LAYOUT}"
            )
    if model.llm.config.model_type not in LLMS[family]:
        raise DataError(
            f"llm: {model.llm.config.model_type}, and {family} has {' or '.join(LLMS[family])}; "
            f"{OTHER_LAYOUT}"
        )
    mappings = tensor_mappings(model, family, released.shapes if released is not None else ())
    if released is None:
        raise DataError(
            f"no released {family} folder is known to write like (model.released is None): load "
            f"one; or {OTHER_LAYOUT}"
        )
    check_shapes(released, mappings, optional_name(model, family))
    return mappings


def check_fusion(fusion: nn.Module, family: str) -> None:
    """Raises DataError for a form of a fusion that was never released."""
    # no tensor tells it: the released code would read such a folder, and give other logits
    if isinstance(fusion, Concat) and fusion.attention != "causal":
        raise DataError(
            f"fusion: attention {fusion.attention}, and a released {family} has causal "
            f"attention alone; {OTHER_LAYOUT}"
        )
    if isinstance(fusion, HyperAttention) and (
        fusion.gate == "none" or fusion.norm != "shared" or not fusion.mi_rope
    ):
        raise DataError(
            f"fusion: gate {fusion.gate}, norm {fusion.norm}, mi_rope {fusion.mi_rope}, and every "
            f"released owl3 has a gate, the shared norm and MI-RoPE; {OTHER_LAYOUT}"
        )


def check_shapes(
    released: Released, mappings: dict[str, TensorMapping], optional: str | None
) -> None:
    """Raises DataError where the model has other tensors than the folder that it came from."""
    for name, mapping in mappings.items():
        shape = released.shapes.get(name)
        if shape != mapping.shape and not (shape is None and name == optional):
            part = mapping.name.partition(".")[0]
            folder_had = f"shape {shape}" if shape else "no such tensor"
            raise DataError(
                f"{part}: {name} has shape {mapping.shape}, and the released folder had "
                f"{folder_had}; load the model anew"
            )
    missing = sorted(set(released.shapes) - set(mappings) - set(released.original_tensors))
    if missing:
        raise DataError(
            f"{part_name(missing[0])}: the released folder had {', '.join(missing)}, and the model "
            "does not; load the model anew"
        )


def part_name(name: str) -> str:
    """Returns the part that a released tensor belongs to, by its name."""
    if "abstractor." in name or "projector." in name:
        return "connector"
    if "vision_model." in name:
        return "vision"
    return "llm" if "layers." in name else "connector"


def write_record(released: Released, folder: Path) -> None:
    """Writes the released JSON files, the tensors that the model cannot give back, and each
    tensor's type and shape."""
    folder.mkdir(parents=True)
    for name, content in released.files.items():
        (folder / name).write_bytes(content)
    if released.original_tensors:
        tensors = dict(released.original_tensors)
        save_file(tensors, folder / ORIGINAL_TENSORS, metadata={"format": "pt"})
    dtypes = {}
    for name, dtype in released.dtypes.items():
        # None stays None: numbers that are not floating-point are written as they were
        dtypes[name] = dtype and str(dtype).removeprefix("torch.")
    record = {
        "family": released.family,
        "image_token_id": released.image_token_id,
        "dtypes": dtypes,
        "shapes": released.shapes,
        "files": sorted(released.files),
    }
    # inside of an export, which is written atomically
    (folder / "record.json").write_text(json.dumps(record) + "\n")
