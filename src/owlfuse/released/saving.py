"""A model that was loaded from a released folder, written in that layout."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from owlfuse.folders import whole_folder
from owlfuse.model import MultimodalLM
from owlfuse.released.forms import places_in
from owlfuse.released.names import Place


def save(model: MultimodalLM, folder: Path | str, max_shard_size: str = "5GB") -> Path:
    """Writes the released layout: the JSON files of the folder that the model came from byte for byte, and its tensors under
    their names and of their types, with the model's numbers now; in shards over a size. It appears whole or not at all.

    Tensors that the model does not use are written as they were, and so are those of another type than the model's as long as
    the model has the numbers that they were rounded to: what was loaded and not trained comes back bit for bit.

    Raises:
        FileExistsError: the folder holds something.
        DataError: a part that the family does not have (the message begins with it), or a model that came from elsewhere.
    """
    folder = Path(folder).expanduser()
    places = places_in(model)
    with whole_folder(folder) as beside:
        for name, content in model.released.files.items():
            (beside / name).write_bytes(content)
        save_torch_state_dict(released_tensors(model, places), beside, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def released_tensors(model: MultimodalLM, places: dict[str, Place]) -> dict[str, Tensor]:
    """Every tensor of the folder by its name there, no two of them in the same memory."""
    state, released = model.state_dict(), model.released
    out: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, dtype in released.dtypes.items():
        original = released.kept.get(name)
        if name not in places:
            out[name] = original
            continue
        place = places[name]
        value = place.take(state[place.name])
        if original is not None and torch.equal(value.cpu(), original.to(value.dtype)):
            out[name] = original
            continue
        value = value.to(dtype)
        memory = value.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out
