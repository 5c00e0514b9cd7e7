"""The model as one GPU of a layout holds it, on the meta device, and what its step needs there.

B rows, T text positions, I images of a row, H and W the picture's size in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, nn

from owlfuse.core.types import IMAGE, Batch
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, on_meta
from owlfuse.planning.meter import StepCost, measure_step
from owlfuse.training.optim import AdamWCosine

HALF = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Lightning's `precision`: what parameters are held in (None: as they are), and what a step
    computes in."""

    parameters: torch.dtype | None
    autocast: torch.dtype | None

    @classmethod
    def of(cls, name: str | int | None) -> Precision:
        """Return the precision of `32-true`, `bf16-mixed`, `bf16-true`, `16-mixed`, ...

        Raises ValueError for 64 bits and transformer engines.
        """
        kind, _, mode = str(name or "32-true").partition("-")
        # Lightning takes `32` for 32-true, and `16` and `bf16` for the mixed ones.
        mode = mode or ("true" if kind == "32" else "mixed")
        if mode not in ("true", "mixed") or kind not in (*HALF, "32"):
            raise ValueError(
                f"precision is {name}, and a plan knows 32-true, bf16-mixed, bf16-true, 16-mixed "
                "and 16-true"
            )
        half = HALF.get(kind)
        return cls(half if mode == "true" else None, half if mode == "mixed" else None)


def meta_model(part_configs: dict[str, Any], vocab_size: int) -> MultimodalLM:
    """Return the configuration's `model` on the meta device, in training mode.

    Raises ValueError: parts that do not fit together.
    """
    # SDPA keeps as much as flash attention, which does not run on the meta device.
    llm = {**part_configs["llm"], "attention": "sdpa"}
    new_tokens = None
    fusion = get_class(part_configs["fusion"]["_target_"])
    # A fusion that reads the embedding of <image> has the tables of a pretrained LLM trained for
    # it: gradients and moments are of the whole tables, whichever the row.
    if llm.get("pretrained") and not getattr(fusion, "splices", True):
        new_tokens = {IMAGE: 0}
    model, _ = on_meta({**part_configs, "compile": False, "llm": llm}, vocab_size, new_tokens)
    return model.train()


def with_checkpointing(part_configs: dict[str, Any], model: MultimodalLM) -> dict[str, Any]:
    """Return the configurations with activation checkpointing in every part that has it, but for
    those of the model that refuse it."""
    configs = copy.deepcopy(part_configs)
    for name in ("vision", "connector"):
        # A copy: the model is measured without checkpointing too.
        part = copy.deepcopy(getattr(model, name))
        if "gradient_checkpointing" not in configs[name]:
            continue
        # A backbone whose blocks timm does not know refuses.
        with suppress(ValueError):
            part.set_checkpointing(True)
            configs[name]["gradient_checkpointing"] = True
    configs["llm"]["gradient_checkpointing"] = True
    return configs


def rank_model(
    model: MultimodalLM, tensor: int = 1, dtype: torch.dtype | None = None
) -> MultimodalLM:
    """Return a copy of the model as one of `tensor` ranks holds it, in another type of numbers
    where one is given.

    Raises:
        ValueError: heads or widths that the ranks do not divide.
    """
    model.check_split(tensor)
    # a copy, since the unsplit model serves other layouts too
    model = copy.deepcopy(model)
    if tensor > 1:
        split_projections(model, tensor)
    return model if dtype is None else model.to(dtype)


def split_projections(model: MultimodalLM, ranks: int) -> None:
    """Leaves the first rank's rows or columns of the projections that tensor parallelism splits,
    LoRA's updates included.

    The adaptive gate of hyperattention, which reads all heads, is taken to read this rank's, so
    that it is a little too small.
    """
    for projection, role in model.projections():
        for path, module in projection.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            # LoRA's product is split on the side that its projection is split on.
            if role != "rows" and "lora_A" not in path:
                narrow_linear(module, 0, ranks)
            if role != "columns" and "lora_B" not in path:
                narrow_linear(module, 1, ranks)
    for module in model.fusion.owned(model.llm):
        # Fusions whose parameters are per head take their part of them.
        if hasattr(module, "share"):
            module.share = (0, ranks)  # type: ignore[assignment]  # numbers, no tensor


def narrow_linear(linear: nn.Linear, dim: int, ranks: int) -> None:
    """Leaves one rank's part of the weight's dimension `dim`, and of the bias where that is of
    the outputs."""
    size = linear.weight.shape[dim]
    if size % ranks:
        raise ValueError(f"a projection of width {size} is not divided by {ranks} ranks")
    linear.weight = parameter_like(linear.weight, linear.weight.narrow(dim, 0, size // ranks))
    if dim == 0 and linear.bias is not None:
        linear.bias = parameter_like(linear.bias, linear.bias[: size // ranks])


def parameter_like(parameter: Tensor, part: Tensor) -> nn.Parameter:
    """Return a parameter of the part's shape, trained if the other one is."""
    return nn.Parameter(torch.empty_like(part), parameter.requires_grad)


def meta_batch(model: MultimodalLM, rows: int, length: int, images: int) -> Batch:
    """Return B rows of T tokens with I images each, as the collator would make them, without
    their values; all text is supervised."""
    count = rows * images
    visual_count = count * model.fusion.tokens_per_image
    # The collator puts a blank picture into a batch without images.
    image_shape = (max(count, 1), 3, *model.vision.preprocessing.size)
    # As Lightning casts pictures for weights in half precision alone.
    dtype = next(model.vision.parameters()).dtype
    with torch.device("meta"):
        ids = torch.zeros(rows, length, dtype=torch.long)
        return Batch.of(
            ids,
            torch.zeros_like(ids, dtype=torch.bool),
            torch.zeros(rows, max(images, 1), dtype=torch.long),
            pixel_values=torch.zeros(image_shape, dtype=dtype),
            has_images=images > 0,
            # Flattened indices of the positions that logits are computed at.
            supervised=torch.zeros(max(rows * length - visual_count, 1), dtype=torch.long),
            visual_count=visual_count,
        )


def measure_batch(
    model: MultimodalLM, batch: Batch, autocast: torch.dtype | None = None
) -> StepCost:
    """Return what a micro batch's forward and backward pass needs, the training loss included."""
    inputs = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    model.zero_grad()  # gradients of an earlier measurement would count as alive
    cost = measure_step(model, lambda: batch_loss(model, batch)[0], inputs, autocast)
    model.zero_grad()
    return cost


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(model: MultimodalLM, optim: AdamWCosine) -> int:
    """Return the bytes of the optimizer's state after a step: that of a step with small stand-ins,
    grown to the parameters' sizes."""
    total = 0.0
    for group in optim.groups(model):
        stand_ins: dict[tuple[torch.Size, torch.dtype], nn.Parameter] = {}
        for parameter in group["params"]:
            key = stand_in_shape(parameter), parameter.dtype
            if key not in stand_ins:
                # On the CPU: a meta tensor takes no step.
                stand_in = nn.Parameter(torch.ones(key[0], dtype=key[1], device="cpu"))
                stand_in.grad = torch.ones_like(stand_in)
                stand_ins[key] = stand_in
        optimizer = optim.optimizer([{**group, "params": list(stand_ins.values())}])
        optimizer.step()
        for parameter in group["params"]:
            shape = stand_in_shape(parameter)
            for value in optimizer.state[stand_ins[shape, parameter.dtype]].values():
                if not torch.is_tensor(value):
                    continue
                # A moment has the parameter's shape; a count of steps is a scalar.
                grows = value.shape == shape and len(shape) > 0
                factor = parameter.numel() / value.numel() if grows else 1
                total += bytes_of([value]) * factor
    return round(total)


def stand_in_shape(parameter: Tensor) -> torch.Size:
    """Return about 8 for the smallest dimension, the others in proportion: Muon chooses matrices
    by how long and narrow they are."""
    unit = max(1, min(parameter.shape, default=1) // 8)
    return torch.Size(max(1, size // unit) for size in parameter.shape)


def gathered_bytes(model: MultimodalLM, dtype: torch.dtype | None) -> int:
    """Return the bytes of unsharded parameters and gradients that FSDP holds at a time: what is
    outside of layers and blocks, the largest of those twice (the next is fetched while one
    computes), and the gradients of one.

    Args:
        dtype: what they are gathered in, by default that of the parameters.
    """

    def size(parameters: list[nn.Parameter]) -> int:
        if dtype is None:
            return bytes_of(parameters)
        return sum(parameter.numel() for parameter in parameters) * dtype.itemsize

    units = [list(unit.parameters()) for unit in model.sharding_units()]
    in_units = {id(parameter) for unit in units for parameter in unit}
    root = [parameter for parameter in model.parameters() if id(parameter) not in in_units]
    # torch's FSDP2 prefetches one unit, and reduces one unit's gradients at a time.
    largest = max(size(unit) for unit in units)
    gradients = max(size([p for p in unit if p.requires_grad]) for unit in units)
    return size(root) + 2 * largest + gradients
