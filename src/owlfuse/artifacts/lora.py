"""LoRA's updates of an exported model: written in peft's format, folded in, or left out."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from owlfuse.model.adapters import without_base_layers

NAME = "default"
"""peft's name of the adapter that owlfuse trains."""


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns the layers with a LoRA update, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def without_lora(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's state under the names it has without LoRA."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            state[without_base_layers(name)] = tensor
    return state


def merge_lora(model: nn.Module) -> None:
    """Adds the updates to the weights, and takes the LoRA layers out."""
    layers = lora_layers(model)
    for layer in layers.values():
        layer.merge(safe_merge=True)
    for name, layer in layers.items():
        if name.endswith(".base_layer"):  # inside of another, which is around the same module
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())


def save_lora(model: nn.Module, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for
    `PeftModel.from_pretrained(base, folder)`. Nothing is written where the model has no LoRA."""
    layers = lora_layers(model)
    if not layers:
        return
    ranks = {name: layer.r[NAME] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[NAME] for name, layer in layers.items()}
    first = next(iter(layers))
    target_modules, target_parameters = [], []
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            target_parameters.append(f"{without_base_layers(name)}.{layer.parameter_name}")
        else:
            target_modules.append(name)
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        target_modules=sorted(target_modules),
        target_parameters=sorted(set(target_parameters)) or None,
        # peft's per-layer overrides of r and lora_alpha
        rank_pattern={name: rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        bias="none",
    )
    tensors = {}
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)[NAME].weight
            tensors[f"base_model.model.{name}.{matrix}.weight"] = weight.detach().contiguous()
    # inside of the export's temporary folder
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
