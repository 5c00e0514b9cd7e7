"""LoRA's updates of an exported model: written in peft's format, folded in, or left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from owlfuse.core.errors import DataError
from owlfuse.model.adapters import NAME, START, without_base_layers
from owlfuse.model.quantization import dense_layer, dense_weight, dequantize, quantized_layers


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns the layers with a LoRA update, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Returns the type of a model's weights, those in 4 bits apart."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def without_lora(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's state under the names it has without LoRA, weights in 4 bits as the
    numbers that they stand for."""
    quantized = quantized_layers(model)
    dtype = floating_dtype(model)
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.partition(".weight")
        # bitsandbytes has the scales beside the weight, as `weight.absmax`
        if ".lora_" in name or (layer in quantized and kind):
            continue
        if name.endswith(".weight") and layer in quantized:
            tensor = dense_weight(quantized[layer], dtype)
        elif name.endswith(".bias") and name.removesuffix(".bias") in quantized:
            tensor = tensor.to(dtype)
        state[without_base_layers(name)] = tensor
    return state


def merge_lora(model: nn.Module) -> None:
    """Adds the updates to the weights, and takes the LoRA layers out. Weights in 4 bits become
    plain ones first, and a model in 16 bits with updates in 32 gets 32, in which they are kept."""
    layers = lora_layers(model)
    if any(has_wider_updates(layer) for layer in layers.values()):
        model.float()
    dtype = floating_dtype(model)
    quantized = quantized_layers(model)
    for name, layer in layers.items():
        base_name = f"{name}.base_layer"
        if base_name in quantized:
            base = quantized[base_name]
            merged = merged_weight(layer, dense_weight(base, dtype))
            model.set_submodule(name, dense_layer(base, merged))
        else:
            # safe: peft raises where a sum is not finite, so that no such weight is exported
            layer.merge(safe_merge=True)
    for name, layer in layers.items():
        # inside of another, which is around the same module
        is_nested = name.endswith(".base_layer")
        if not is_nested and f"{name}.base_layer" not in quantized:
            model.set_submodule(name, layer.get_base_layer())
    dequantize(model, dtype)


def has_wider_updates(layer: Any) -> bool:
    """Returns whether a layer's weight has 16 bits and its update 32, which would be rounded away
    in the sum."""
    # experts that are stacked in one parameter have no layer of their own
    is_stacked = isinstance(layer, ParamWrapper)
    weight = layer.get_param() if is_stacked else layer.get_base_layer().weight
    update = next(iter(layer.lora_A.values())).weight
    return weight.is_floating_point() and weight.element_size() < update.element_size()


@torch.no_grad()
def merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """Returns a weight with the updates of a layer folded in; peft would put the sum into 4 bits
    again. With DoRA each row has the length that was trained (arXiv 2402.09353, eq. 5)."""
    merged = weight.clone()
    for name in layer.active_adapters:
        merged += layer.get_delta_weight(name).to(weight.dtype)
    if NAME not in layer.lora_magnitude_vector:
        return merged
    lengths = layer.lora_magnitude_vector[NAME].weight
    return merged * (lengths / merged.norm(dim=1))[:, None].to(merged.dtype)


def update_of(layer: Any) -> tuple[Tensor, Tensor, int, float]:
    """Returns the update of a layer as an adapter's file has it: A (rank, width that goes in), B
    (width that comes out, rank), the rank and alpha. One that had its start subtracted is a single
    one of twice the rank: B A - B0 A0 = [B, -B0] [A; A0]."""
    down, up = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
    rank, alpha = layer.r[NAME], layer.lora_alpha[NAME]
    if START in layer.r:
        down = torch.cat([down, layer.lora_A[START].weight.detach()])
        up = torch.cat([up, -layer.lora_B[START].weight.detach()], dim=1)
        # the same scale at twice the rank
        alpha *= math.sqrt(2) if layer.use_rslora[NAME] else 2
        rank *= 2
    return down, up, rank, alpha


def check_one_kind(layers: dict[str, LoraLayer]) -> None:
    """Raises DataError where some updates are of DoRA and others are not: an adapter's folder has
    one kind."""
    names_by_kind: dict[bool, str] = {}
    for name, layer in layers.items():
        names_by_kind.setdefault(bool(len(layer.lora_magnitude_vector)), name)
    if len(names_by_kind) == 2:
        raise DataError(
            f"{names_by_kind[True]} has an update with use_dora and {names_by_kind[False]} one "
            "without, which do not fit one adapter of peft; export with merge=true"
        )


def save_lora(model: nn.Module, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for
    `PeftModel.from_pretrained(base, folder)`. Nothing is written where the model has no LoRA.

    Raises DataError for updates that do not fit one adapter.
    """
    layers = lora_layers(model)
    if not layers:
        return
    check_one_kind(layers)
    has_rslora = {layer.use_rslora[NAME] for layer in layers.values()}
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}  # peft, which says an int, takes any number
    target_modules, target_parameters = [], []
    tensors = {}
    for name, layer in layers.items():
        down, up, ranks[name], alphas[name] = update_of(layer)
        # parts may differ, and an adapter has one rule: alpha is what gives the same scale
        if len(has_rslora) == 2:
            alphas[name] = layer.scaling[NAME] * ranks[name]
        if isinstance(layer, ParamWrapper):
            # peft looks for the matrix where it is without any wrapper
            target_parameters.append(f"{without_base_layers(name)}.{layer.parameter_name}")
        else:
            target_modules.append(name)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = down.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = up.contiguous()
        lengths: Any = layer.lora_magnitude_vector
        if NAME in lengths:
            # without `.weight`, as peft writes it
            vector = lengths[NAME].weight.detach()
            tensors[f"{prefix}.lora_magnitude_vector"] = vector.contiguous()
    first = next(iter(layers))
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        target_modules=sorted(target_modules),
        target_parameters=sorted(set(target_parameters)) or None,
        # peft's per-layer overrides of r and lora_alpha
        rank_pattern={name: rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        use_dora=bool(len(layers[first].lora_magnitude_vector)),
        use_rslora=has_rslora == {True},
        bias="none",
    )
    # inside of the export's temporary folder
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
