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
    released = model.released
    with whole_folder(folder) as beside:
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
