"""The model as one GPU of a layout holds it, on the meta device, and what its step needs there.

B rows, T text positions, I images of a row, H and W the picture's size in pixels.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from owlfuse.core.types import Batch
from owlfuse.model.llm import check_split
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, on_meta
from owlfuse.planning.meter import Reading, read
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
        """`32-true`, `bf16-mixed`, `bf16-true`, `16-mixed`, ...

        Raises ValueError for 64 bits and transformer engines.
        """
        kind, _, mode = str(name or "32-true").partition("-")
        mode = mode or ("true" if kind == "32" else "mixed")
        if mode not in ("true", "mixed") or kind not in (*HALF, "32"):
            raise ValueError(
                f"precision is {name}, and a plan knows 32-true, bf16-mixed, bf16-true, 16-mixed "
                "and 16-true"
            )
        half = HALF.get(kind)
        return cls(half if mode == "true" else None, half if mode == "mixed" else None)


def whole_model(nodes: dict[str, Any], vocab_size: int) -> MultimodalLM:
    """The configuration's `model` on the meta device, in training mode.

    Raises ValueError: parts that do not fit together.
    """
    # as much as flash attention needs
    nodes = {**nodes, "compile": False, "llm": {**nodes["llm"], "attention": "sdpa"}}
    return on_meta(nodes, vocab_size)[0].train()


def checkpointed(nodes: dict[str, Any], model: MultimodalLM) -> dict[str, Any]:
    """`nodes` with activation checkpointing in every part that has it, but for those of the
    model that refuse it."""
    nodes = copy.deepcopy(nodes)
    for name in ("vision", "connector"):
        part = copy.deepcopy(getattr(model, name))
        if "gradient_checkpointing" not in nodes[name] or not hasattr(part, "set_checkpointing"):
            continue
        with suppress(ValueError):
            part.set_checkpointing(True)
            nodes[name]["gradient_checkpointing"] = True
    nodes["llm"]["gradient_checkpointing"] = True
    return nodes


def part_of_rank(
    model: MultimodalLM, tensor: int = 1, dtype: torch.dtype | None = None
) -> MultimodalLM:
    """A copy of the model as one of `tensor` ranks holds it, in another type of numbers where one
    is given.

    Raises:
        ValueError: heads or widths that the ranks do not divide.
    """
    check_split(model.llm, tensor)
    model = copy.deepcopy(model)
    if tensor > 1:
        divide(model, tensor)
    return model if dtype is None else model.to(dtype)


def divide(model: MultimodalLM, ranks: int) -> None:
    """Leaves the first rank's rows or columns of the projections that tensor parallelism splits,
    LoRA's updates included.

    The adaptive gate of hyperattention, which reads all heads, is taken to read this rank's, so
    that it is a little too small.
    """
    for projection, role in model.projections():
        for path, module in projection.named_modules():
            if isinstance(module, nn.Linear):
                if role != "rows" and "lora_A" not in path:
                    cut(module, 0, ranks)
                if role != "columns" and "lora_B" not in path:
                    cut(module, 1, ranks)
    for module in model.fusion.owned(model.llm):
        if hasattr(module, "share"):
            module.share = (0, ranks)  # type: ignore[assignment]  # numbers, no tensor


def cut(linear: nn.Linear, dim: int, ranks: int) -> None:
    """One rank's part of the weight's dimension `dim`, and of the bias where that is of the
    outputs."""
    size = linear.weight.shape[dim]
    if size % ranks:
        raise ValueError(f"a projection of width {size} is not divided by {ranks} ranks")
    linear.weight = like(linear.weight, linear.weight.narrow(dim, 0, size // ranks))
    if dim == 0 and linear.bias is not None:
        linear.bias = like(linear.bias, linear.bias[: size // ranks])


def like(parameter: Tensor, part: Tensor) -> nn.Parameter:
    """A parameter of the part's shape, trained if the whole is."""
    return nn.Parameter(torch.empty_like(part), parameter.requires_grad)


def meta_batch(model: MultimodalLM, rows: int, length: int, images: int) -> Batch:
    """B rows of T tokens with I images each, as the collator would make them, without their
    values; all text is supervised."""
    count, size = rows * images, model.vision.preprocessing.size
    taken = count * model.fusion.tokens_per_image
    with torch.device("meta"):
        ids = torch.zeros(rows, length, dtype=torch.long)
        return Batch(
            input_ids=ids,
            attention_mask=torch.zeros_like(ids),
            labels=torch.zeros_like(ids),
            placeholder=torch.zeros_like(ids, dtype=torch.bool),
            pixel_values=torch.zeros(
                max(count, 1), 3, *size, dtype=next(model.vision.parameters()).dtype
            ),
            image_mask=torch.zeros(max(count, 1), dtype=torch.bool),
            image_index=torch.zeros(rows, max(images, 1), dtype=torch.long),
            image_positions=torch.zeros(rows, max(images, 1), dtype=torch.long),
            has_images=images > 0,
            supervised=torch.zeros(max(rows * length - taken, 1), dtype=torch.long),
            visual_count=taken,
        )


def read_step(model: MultimodalLM, batch: Batch, autocast: torch.dtype | None = None) -> Reading:
    """A micro batch's forward and backward pass, the training loss included."""
    inputs = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    model.zero_grad()
    reading = read(model, lambda: batch_loss(model, batch)[0], inputs, autocast)
    model.zero_grad()
    return reading


def size_of(tensors: Any) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_state(model: MultimodalLM, optim: AdamWCosine) -> int:
    """Bytes of the optimizer's state after a step: that of a step with small stand-ins, grown to
    the parameters' sizes."""
    total = 0.0
    for group in optim.groups(model):
        keys = [(stand_in_shape(p), p.dtype) for p in group["params"]]
        small = {
            key: nn.Parameter(torch.ones(key[0], dtype=key[1], device="cpu")) for key in set(keys)
        }
        for parameter in small.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer = optim.optimizer([{**group, "params": list(small.values())}])
        optimizer.step()
        for parameter, key in zip(group["params"], keys, strict=True):
            for value in filter(torch.is_tensor, optimizer.state[small[key]].values()):
                grows = value.shape == key[0] and len(key[0]) > 0
                total += size_of([value]) * (parameter.numel() / value.numel() if grows else 1)
    return round(total)


def stand_in_shape(parameter: Tensor) -> torch.Size:
    """About 8 in the smallest dimension, the others in proportion:

    Muon takes some matrices by how long and narrow they are.
    """
    unit = max(1, min(parameter.shape, default=1) // 8)
    return torch.Size(max(1, size // unit) for size in parameter.shape)


def gathered(model: MultimodalLM, dtype: torch.dtype | None) -> int:
    """Bytes of whole parameters and gradients that FSDP holds at a time: what is outside of layers
    and blocks, the largest of those twice (the next is fetched while one computes), and the
    gradients of one.

    Args:
        dtype: what they are gathered in, by default that of the parameters.
    """
    units = [list(unit.parameters()) for unit in model.sharding_units()]
    inside = {id(parameter) for unit in units for parameter in unit}
    root = [parameter for parameter in model.parameters() if id(parameter) not in inside]

    def whole(parameters: list[nn.Parameter], trained: bool = False) -> int:
        chosen = [p for p in parameters if p.requires_grad or not trained]
        return sum(
            p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in chosen
        )

    return (
        whole(root) + 2 * max(map(whole, units)) + max(whole(unit, trained=True) for unit in units)
    )
