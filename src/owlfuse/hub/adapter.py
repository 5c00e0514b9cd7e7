"""LoRA's updates of an exported model: written in peft's format, folded in, or left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from owlfuse.adapters import without_base_layers
from owlfuse.deferred import Deferred, in_memory_after_all
from owlfuse.hub.writing import write_file

NAME = "default"  # peft's, of the adapter that owlfuse trains


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with a LoRA update, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def without_lora(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names it has without LoRA."""
    return {without_base_layers(n): t for n, t in model.state_dict().items() if ".lora_" not in n}


def merge_lora(model: nn.Module, deferred: Deferred | None = None) -> None:
    """Adds the updates to the weights, and takes the LoRA layers out.

    Args:
        deferred: what knows the tensors of a model without memory; each layer is then merged when its weight is asked for.
    """
    layers = lora_layers(model)
    for layer in layers.values():
        if adapted_parameter(layer).is_meta:
            assert deferred is not None
            merge_later(layer, deferred)
        else:
            layer.merge(safe_merge=True)
    for name, layer in layers.items():
        if name.endswith(".base_layer"):  # inside of another, which is around the same module
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())


def adapted_parameter(layer: Any) -> nn.Parameter:
    """The parameter that a LoRA layer updates: a linear layer's weight, or another one by its name."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def merge_later(layer: Any, deferred: Deferred) -> None:
    """Has the weight of a layer without memory read as what merging gives."""
    with in_memory_after_all():
        frame = copy.deepcopy(layer)
    before = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    weight = adapted_parameter(layer)
    weight.data = torch.empty_like(weight.data)
    deferred.read(weight, partial(merged, frame, before, deferred.value))


def merged(frame: Any, before: dict[str, Tensor], value: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight of a layer with its update, in memory: merged on a copy of the layer."""
    layer = copy.deepcopy(frame).to_empty(device="cpu")
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(value(before[name]))
    layer.merge(safe_merge=True)
    return adapted_parameter(layer).data


def save_lora(model: nn.Module, folder: Path, value: Callable[[Tensor], Tensor]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained(base, folder)`. Nothing is
    written where the model has no LoRA.

    Args:
        value: what a tensor of the model holds.
    """
    layers = lora_layers(model)
    if not layers:
        return
    ranks = {name: layer.r[NAME] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[NAME] for name, layer in layers.items()}
    first = next(iter(layers))
    targets = {
        f"{without_base_layers(name)}.{layer.parameter_name}"
        for name, layer in layers.items()
        if isinstance(layer, ParamWrapper)
    }
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        target_modules=sorted(name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)),
        target_parameters=sorted(targets) or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        bias="none",
    )
    tensors = {}
    for name, layer in layers.items():
        for half in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{name}.{half}.weight"] = getattr(layer, half)[NAME].weight.detach()
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    write_file(folder / "adapter_model.safetensors", tensors, lambda name: value(tensors[name]))
