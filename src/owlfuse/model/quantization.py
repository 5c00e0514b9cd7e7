"""An LLM's weights in 4 bits by bitsandbytes, the frozen base of QLoRA (arXiv 2305.14314).

Din, Dout the widths of a linear layer, N the numbers of its weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from owlfuse.core.packages import missing
from owlfuse.model.layouts import decoder_layers, layers_past_their_forward, names_in_float32

# optional: a run is planned on the meta device without it
if is_bitsandbytes_available():
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

log = logging.getLogger(__name__)
BLOCK, NESTED_BLOCK = 64, 256
"""Numbers that share a scale, and scales that share a scale of their own with `use_double_quant`:
bitsandbytes' defaults."""
NARROW = 16
"""Rows of so few numbers are not worth 4 bits: Gemma 3n has some of 4."""
COMPUTE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Quantization:
    """How weights are held in 4 bits; names and meanings are those of `bnb_4bit_...` in
    transformers' BitsAndBytesConfig.

    Args:
        quant_type: `nf4`, whose 16 values are quantiles of a normal distribution, or `fp4`.
        use_double_quant: the scales of blocks are quantized, too, to 8 bits.
        compute_dtype: what products are computed in: `bfloat16`, `float16` or `float32`.
    """

    quant_type: str = "nf4"
    use_double_quant: bool = True
    compute_dtype: str = "bfloat16"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Quantization:
        """Returns the settings of a configuration's node.

        Raises:
            ValueError: an unknown key or value.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"quantization: no such key {unknown[0]}; the keys are {', '.join(known)}"
            )
        quantization = cls(**options)
        choices: dict[str, tuple[Any, ...]] = {
            "quant_type": ("nf4", "fp4"),
            "use_double_quant": (True, False),
            "compute_dtype": tuple(COMPUTE_DTYPES),
        }
        for name, values in choices.items():
            value = getattr(quantization, name)
            # by its type, too: 1 is no true
            if value not in values or type(value) is not type(values[0]):
                listed = ", ".join(str(choice) for choice in values)
                raise ValueError(f"quantization: {name} is {value!r}, expected one of {listed}")
        return quantization

    def weight_bytes(self, count: int) -> int:
        """Returns the bytes that a weight of N numbers takes: half a byte each, a float32 scale for
        every 64, or with `use_double_quant` a byte for every 64 and a float32 for every 256 of
        those; the tables of 16 and 256 values are left out."""
        blocks = -(-count // BLOCK)
        scales = 4 * blocks
        if self.use_double_quant:
            scales = blocks + 4 * -(-blocks // NESTED_BLOCK)
        return -(-count // 2) + scales


class DequantizedProduct(torch.autograd.Function):
    """A product with a weight that is made anew of its 4 bits in both passes, and never kept, as
    bitsandbytes computes it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns (..., Dout) of states (..., Din) and a weight (Dout, Din)."""
        ctx.save_for_backward(weight)
        bias = None if bias is None else bias.to(states.dtype)
        return F.linear(states, weight.to(states.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient of the states alone: the weight is frozen."""
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class PlannedLinear(nn.Linear):
    """A linear layer on the meta device that stands for one in 4 bits, where bitsandbytes has no
    layers: so that a run is checked and planned without it."""

    def __init__(self, linear: nn.Linear, quantization: Quantization) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        self.quantization = quantization

    def forward(self, input: Tensor) -> Tensor:
        """Returns (..., Dout) of (..., Din), with the temporary tensors of a layer in 4 bits."""
        states = input.to(COMPUTE_DTYPES[self.quantization.compute_dtype])
        return DequantizedProduct.apply(states, self.weight, self.bias).to(input.dtype)


def quantize(
    llm: PreTrainedModel, quantization: Quantization, without: Iterable[nn.Module] = ()
) -> None:
    """Puts layers in 4 bits into the place of an LLM's linear layers, all but its head and those
    whose weight a kernel reads. On the meta device they only stand for such.

    transformers quantizes while it loads; here the LLM is there already, so that fusions have made
    their copies of its layers, and so that exports and GGUF files can be quantized, too.

    Args:
        without: modules, those of the fusion, whose layers stay as they are.

    Raises:
        ValueError: the LLM has no linear layer but its head, as GPT-2; or one of a width that
            bitsandbytes does not serve.
        MissingPackage: bitsandbytes is not installed, and the LLM is not on the meta device.
    """
    # transformers leaves the head out, too, when it quantizes
    excluded = {id(llm.get_output_embeddings())} | layers_past_their_forward(llm, types_too=True)
    for path in names_in_float32(llm, strict=False):
        excluded.add(id(llm.get_submodule(path.rpartition(".")[0])))
    for owner in without:
        excluded.update(id(child) for child in owner.modules())
    # a list, since modules are replaced on the way
    for name, module in list(llm.named_modules()):
        # not a subclass: what a fusion or a family makes of one may not be only a product
        if type(module) is not nn.Linear or id(module) in excluded:
            continue
        linear: nn.Linear = module
        if linear.in_features <= NARROW:
            # next to nothing: it keeps its type
            excluded.add(id(linear))
            continue
        check_rows(name, linear)
        if linear.weight.is_meta:
            llm.set_submodule(name, PlannedLinear(linear, quantization))
        else:
            check_installed()
            llm.set_submodule(name, quantized_layer(linear, quantization))
    if not quantized_layers(llm):
        raise ValueError(
            f"llm: quantization: {type(llm).__name__} has no linear layer that could be held in 4 "
            "bits; leave quantization out, or choose another LLM"
        )
    warn_of_plain_weights(llm, excluded)
    # what transformers sets, and peft looks for
    loaded: Any = llm
    loaded.is_loaded_in_4bit = True


def check_rows(name: str, linear: nn.Linear) -> None:
    """Raises ValueError for a layer whose rows are no whole blocks."""
    # bitsandbytes 0.50 makes other numbers of some such weights on CPUs, without a word: those of
    # rows of 32 or 96, where a block holds the ends of two rows
    if linear.in_features % BLOCK:
        raise ValueError(
            f"llm: quantization: {name} has rows of {linear.in_features} numbers, and bitsandbytes "
            f"reads them right on CPUs only where {BLOCK} divides that; leave quantization out, or "
            "choose another LLM"
        )


def warn_of_plain_weights(llm: PreTrainedModel, excluded: set[int]) -> None:
    """Logs how much of an LLM's decoder layers is in no linear layer and so not in 4 bits, as the
    stacked matrices of experts.

    Args:
        excluded: ids of modules whose layers are not meant to be in 4 bits.
    """
    in_4_bits = quantized_counts(llm)
    plain = 0
    for layer in decoder_layers(llm):
        for module in layer.modules():
            if id(module) in excluded:
                continue
            for parameter in module.parameters(recurse=False):
                # norms and biases are small, and no method quantizes them
                is_matrix = parameter.ndim > 1 and id(parameter) not in in_4_bits
                plain += parameter.numel() if is_matrix else 0
    # a plan comes before every training, which would say it twice
    if plain and next(llm.parameters()).is_meta:
        share = plain / (plain + sum(in_4_bits.values()))
        log.warning(
            "quantization: %.0f %% of the weights of the LLM's layers are in no linear layers "
            "(stacked experts, for instance), and keep their type",
            100 * share,
        )


def quantized_layer(linear: nn.Linear, quantization: Quantization) -> nn.Linear:
    """Returns bitsandbytes' layer with the weight of a linear layer in 4 bits."""
    compute_dtype = COMPUTE_DTYPES[quantization.compute_dtype]
    # on the meta device, since its weight is replaced below
    layer: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=quantization.use_double_quant,
        quant_type=quantization.quant_type,
        device="meta",
    )
    weight: Any = Params4bit(
        linear.weight.data,
        compress_statistics=quantization.use_double_quant,
        quant_type=quantization.quant_type,
        module=layer,
    )
    # which is when it is quantized
    layer.weight = weight.to(linear.weight.device)
    if linear.bias is not None:
        # the first forward would cast it in place, and change what is frozen
        layer.bias = nn.Parameter(linear.bias.data.to(compute_dtype))
    # else evaluation on some CPUs repacks the weight, and training after it has no gradients
    layer.support_avx512bf16_for_cpu = False
    return layer


def check_installed() -> None:
    """Raises MissingPackage where bitsandbytes is not installed."""
    if not is_bitsandbytes_available():
        raise missing("bitsandbytes", "model.llm.quantization")


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer in 4 bits, or stands for one in a plan."""
    if isinstance(module, PlannedLinear):
        return True
    return is_bitsandbytes_available() and isinstance(module, Linear4bit)


def quantized_layers(root: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers in 4 bits below a module, by name."""
    layers = {}
    for name, module in root.named_modules():
        if is_quantized(module):
            layers[name] = cast("nn.Linear", module)
    return layers


def quantized_counts(root: nn.Module) -> dict[int, int]:
    """Returns how many numbers each weight in 4 bits stands for, by the weight's id."""
    counts = {}
    for layer in quantized_layers(root).values():
        # bitsandbytes packs two numbers into a byte, so numel() is half of them
        counts[id(layer.weight)] = layer.in_features * layer.out_features
    return counts


def quantized_sizes(root: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """Returns how many numbers each of the parameters that are in 4 bits stands for, by name."""
    counts = quantized_counts(root)
    return {name: counts[id(p)] for name, p in parameters.items() if id(p) in counts}


def count_parameters(root: nn.Module) -> int:
    """Returns how many numbers the parameters below a module stand for."""
    counts = quantized_counts(root)
    return sum(counts.get(id(p), p.numel()) for p in root.parameters())


def planned_bytes(root: nn.Module) -> int:
    """Returns the bytes of the parameters below a module on the meta device, those that are to be
    in 4 bits as such."""
    sizes = {}
    for parameter in root.parameters():
        sizes[id(parameter)] = parameter.numel() * parameter.element_size()
    for module in root.modules():
        if isinstance(module, PlannedLinear):
            count = module.in_features * module.out_features
            sizes[id(module.weight)] = module.quantization.weight_bytes(count)
    return sum(sizes.values())


def check_quantized_training(llm: nn.Module, sharded: bool) -> None:
    """Checks that an LLM in 4 bits can be trained, before a weight is made.

    Args:
        sharded: parameters are to be split over ranks.

    Raises:
        ValueError: they cannot.
        MissingPackage: bitsandbytes is not installed.
    """
    if not quantized_layers(llm):
        return
    check_installed()
    check_not_sharded(llm, sharded)


def check_not_sharded(llm: nn.Module, sharded: bool) -> None:
    """Raises ValueError for an LLM in 4 bits whose parameters are to be split over ranks."""
    if sharded and quantized_layers(llm):
        raise ValueError(
            "llm: quantization: weights in 4 bits are not split over ranks by FSDP or tensor "
            "parallelism; take trainer=gpu or trainer=ddp, or leave quantization out"
        )


@torch.no_grad()
def dense_weight(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Returns the weight (Dout, Din) of a layer in 4 bits as its products use it, the numbers that
    the 4 bits stand for rounded to the compute dtype, as a tensor of `dtype`."""
    layer: Any = linear
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(layer.compute_dtype).to(dtype)


def dense_layer(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """Returns a plain linear layer with a weight (Dout, Din) and the bias of another."""
    has_bias = linear.bias is not None
    # no memory for a weight that is replaced at once
    layer = nn.Linear(linear.in_features, linear.out_features, has_bias, device="meta")
    layer.weight = nn.Parameter(weight)
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data.to(weight.dtype))
    return layer


def dequantize(root: nn.Module, dtype: torch.dtype) -> None:
    """Puts plain linear layers in the place of those in 4 bits below a module."""
    for name, linear in quantized_layers(root).items():
        root.set_submodule(name, dense_layer(linear, dense_weight(linear, dtype)))
