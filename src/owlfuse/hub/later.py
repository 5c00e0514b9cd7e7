"""An exported model without memory, each tensor to be read from its file on its own (see `deferred`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from owlfuse.deferred import Deferred, in_memory_after_all
from owlfuse.hub.configuration import OwlfuseConfig
from owlfuse.hub.modeling import OwlfuseForConditionalGeneration
from owlfuse.stored import Safe


def exported_later(folder: Path, attention: str) -> tuple[OwlfuseForConditionalGeneration, dict[str, Any]]:
    """What `OwlfuseForConditionalGeneration.from_pretrained` gives within `Deferred`: the model, and which tensors are missing,
    unexpected or of other shapes (name, found, expected)."""
    deferred = Deferred.current
    assert deferred is not None
    config = OwlfuseConfig.from_pretrained(folder, attn_implementation=attention)
    with deferred.drawing_nothing():
        wrapped = OwlfuseForConditionalGeneration(config)
        set_types(wrapped)
    files = Safe(sorted(folder.glob("model*.safetensors")))
    state = wrapped.state_dict()
    tied = wrapped.get_expanded_tied_weights_keys(all_submodels=True)
    there = set(files) & set(state)
    other = [(n, files.shapes[n], tuple(state[n].shape)) for n in sorted(there) if files.shapes[n] != tuple(state[n].shape)]
    for name in there:
        deferred.read(state[name], partial(files.__getitem__, name))
    missing = set(state) - there - {name for name, source in tied.items() if source in there}
    return wrapped, {"missing_keys": missing, "unexpected_keys": set(files) - there, "mismatched_keys": other}


def set_types(wrapped: OwlfuseForConditionalGeneration) -> None:
    """Gives tensors the types that transformers gives them when it loads the folder: parameters the configuration's, buffers
    those that the constructors make where the configuration's type is the usual one."""
    config: Any = wrapped.config
    dtype = config.dtype
    if dtype in (None, torch.float32):
        return
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with in_memory_after_all(), torch.device("meta"):
            twin = OwlfuseForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    for module, other in zip(wrapped.modules(), twin.modules(), strict=True):
        for name, parameter in other.named_parameters(recurse=False):
            own: Any = module._parameters[name]
            own.data = own.data.to(dtype if parameter.is_floating_point() else parameter.dtype)
        for name, buffer in other.named_buffers(recurse=False):
            present: Any = module._buffers[name]
            module._buffers[name] = present.to(buffer.dtype)
