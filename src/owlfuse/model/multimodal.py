"""backbone -> connector -> fusion -> LLM.

N images, P patches, Q visual tokens per image, B rows, T text positions, D LLM width, Dv vision
width, V vocabulary, R places of logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from hydra.utils import get_object
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from owlfuse.config.build import build
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.adapters import PARTS, Part, PartSummary, apply_adapters
from owlfuse.model.fusion.base import Fusion, fused_output
from owlfuse.model.fusion.probe import check_fusion
from owlfuse.model.llm import (
    PER_HEAD_NORMS,
    TENSOR_ROLES,
    balancing_coefficient,
    balancing_loss,
    decoder_layers,
    width,
)
from owlfuse.model.llm_probe import check_packing


class MultimodalLM(nn.Module):
    """A vision-language model of four parts, the fusion attached to the LLM.

    Attributes:
        nodes: the configuration of each part that the model was assembled from; None for one put
            together by hand.
        balancing_loss: of the last forward in training, how unevenly a mixture of experts used its
            experts (see `llm.balancing_loss`); None for other LLMs, and where nothing of the LLM is
            trained.
        released: an `owlfuse.artifacts.released.loading.Released`, of a model that was read from a
            released checkpoint.
    """

    nodes: dict[str, Any] | None = None
    released: Any = None

    def __init__(
        self, vision: nn.Module, connector: nn.Module, fusion: Fusion, llm: PreTrainedModel
    ) -> None:
        super().__init__()
        # parts of the user's too: what is asked of them depends on what they have
        self.vision: Any = vision
        self.connector: Any = connector
        self.fusion = fusion
        self.llm = llm
        self.packing_checked = False
        self.balancing_loss: Tensor | None = None
        self.new_rows: dict[str, list[int]] = {}
        self.fixed = {
            id(parameter) for parameter in llm.parameters() if not parameter.requires_grad
        }
        check_fusion(fusion, llm)
        fusion.attach(llm)

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Logits (B, T, V) of a batch.

        Args:
            visual: the batch's visual tokens where they are known already; by default they are made
                from its pixels.
            cache: a key-value cache of transformers. With one that holds earlier positions, the
                batch's `input_ids` are the T new ones, and its `attention_mask` covers both.
            logits_to_keep: only of so many last positions; 0: of all. Or (R,) places b * T + t, for
                logits (R, V) there.
        """
        if visual is None:
            visual = self.encode(batch)
        if batch.segment_ids is not None and not self.packing_checked:
            check_packing(self.llm)
            self.packing_checked = True
        balances = self.training and self.balances_experts()
        options = {"output_router_logits": True} if balances else {}
        output = fused_output(
            self.llm, self.fusion, batch, visual, cache, logits_to_keep, **options
        )
        self.balancing_loss = (
            balancing_loss(self.llm, output.router_logits, batch.attention_mask)
            if balances
            else None
        )
        return output.logits[0] if isinstance(logits_to_keep, Tensor) else output.logits

    def balances_experts(self) -> bool:
        """Whether the LLM is a mixture of experts with a balancing loss, and something of it is
        trained."""
        return balancing_coefficient(self.llm) > 0 and any(
            parameter.requires_grad for parameter in self.llm.parameters()
        )

    def encode(self, batch: Batch) -> VisualTokens:
        """Pixels (N, 3, H, W) -> visual tokens (N, Q, D), the backbone once for all images of the
        batch.

        A batch without images passes its blank one, times zero, so that every parameter has a
        gradient and every rank issues the same collectives.
        """
        keeping = (
            nullcontext
            if batch.has_images
            else getattr(self.vision, "statistics_kept", nullcontext)
        )
        with keeping():
            features = self.vision(in_dtype_of(self.vision, batch.pixel_values))
        tokens = self.connector(features)
        for part, found, expected in (
            ("vision", features.shape[1], getattr(self.vision, "patches", None)),
            ("connector", tokens.shape[1], getattr(self.connector, "tokens", None)),
        ):
            if expected not in (None, found):
                raise ValueError(
                    f"{part}: {type(getattr(self, part)).__name__} gives {found} tokens, and says "
                    f"{expected}"
                )
        tokens = tokens * batch.image_mask[:, None, None].to(features.dtype)
        return VisualTokens(tokens, batch.image_index, batch.image_positions)

    def set_image_size(self, image_size: int) -> None:
        """Goes on with pictures of another size, weights kept: position embeddings are resampled,
        tables computed anew.

        Raises:
            ValueError: a part that cannot; the message begins with it.
        """
        try:
            self.vision.set_image_size(image_size)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"vision: image_size: {error}") from error
        if not hasattr(self.connector, "set_grid"):
            raise ValueError(
                f"connector: {type(self.connector).__name__} has no set_grid, and pictures of "
                "another size need it"
            )
        self.connector.set_grid(self.vision.patches, self.vision.grid)
        self.fusion.set_connector_tokens(self.connector.tokens)
        if self.nodes is not None:
            self.nodes = {
                **self.nodes,
                "vision": {**self.nodes["vision"], "image_size": image_size},
            }

    def part(self, name: str) -> Part:
        """One of `adapters.PARTS`. What the fusion put into the LLM belongs to `fusion`."""
        if name in ("vision", "connector"):
            module = getattr(self, name)
            return Part(name, module, dict(module.named_parameters()), blocks_of(module))
        owned = {id(p) for module in self.fusion.owned(self.llm) for p in module.parameters()}
        parameters = {
            n: p for n, p in self.llm.named_parameters() if (id(p) in owned) == (name == "fusion")
        }
        if name == "fusion":
            return Part(name, self.llm, {**parameters, **dict(self.fusion.named_parameters())})
        blocks = [
            [p for p in layer.parameters() if id(p) not in owned]
            for layer in decoder_layers(self.llm)
        ]
        ends = [
            end.weight
            for end in (self.llm.get_input_embeddings(), self.llm.get_output_embeddings())
            if end is not None
        ]
        tables = {n: p for n, p in parameters.items() if any(p is end for end in ends)}
        fixed = {n for n, p in parameters.items() if id(p) in self.fixed}
        return Part(name, self.llm, parameters, blocks, tables, fixed)

    def limited(self) -> list[tuple[nn.Parameter, list[int]]]:
        """The LLM's tables of which only some rows are trained, with those rows."""
        return [(self.llm.get_parameter(name), rows) for name, rows in self.new_rows.items()]

    def sharding_units(self) -> list[nn.Module]:
        """The modules that FSDP gathers one after the other; what is in none of them is gathered
        for the whole forward."""
        parts = [
            module for module in (self.vision, self.connector) if hasattr(module, "sharding_units")
        ]
        return [
            *(unit for part in parts for unit in part.sharding_units()),
            *decoder_layers(self.llm),
        ]

    def projections(self) -> list[tuple[nn.Module, str]]:
        """The linear layers that tensor parallelism splits, each with its role (see
        `llm.TENSOR_ROLES`)."""
        roles = {**TENSOR_ROLES, **self.fusion.tensor_roles}
        layers = [found for layer in decoder_layers(self.llm) for found in linear_layers(layer)]
        return [(module, roles[name]) for name, module in layers if name in roles]

    def per_head(self) -> list[nn.Parameter]:
        """Parameters that every tensor rank has whole and uses for its own heads alone."""
        norms = [
            getattr(layer.self_attn, name, None)
            for layer in decoder_layers(self.llm)
            for name in PER_HEAD_NORMS
        ]
        return [
            *(p for norm in norms if norm is not None for p in norm.parameters()),
            *self.fusion.per_head(self.llm),
        ]

    def _apply(self, fn: Any, recurse: bool = True) -> MultimodalLM:
        """As torch's, which `to` goes through, but the rotary frequencies of the LLM keep their
        precision: in half of it, they would turn far positions wrongly. A private name of torch's,
        and the one place that every way to cast passes."""
        frequencies = {
            name: buffer for name, buffer in self.llm.named_buffers() if "inv_freq" in name
        }
        super()._apply(fn, recurse)
        for name, before in frequencies.items():
            path, _, own = name.rpartition(".")
            module: Any = self.llm.get_submodule(path)
            after = module._buffers[own]
            if after.dtype != before.dtype:
                module._buffers[own] = before.to(after.device)
        return self

    def train(self, mode: bool = True) -> MultimodalLM:
        """As torch's, but a batch norm whose weight is frozen keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if (
                isinstance(module, _BatchNorm)
                and module.weight is not None
                and not module.weight.requires_grad
            ):
                module.eval()
        return self


def in_dtype_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """The tensor in the dtype of a module's weights, as they are in a run of half precision
    alone (`bf16-true`)."""
    weight = next(module.parameters(), None)
    return tensor if weight is None else tensor.to(weight.dtype)


def linear_layers(module: nn.Module, path: tuple[str, ...] = ()) -> list[tuple[str, nn.Module]]:
    """The linear layers below a module, LoRA's around them taken as one, with the last two parts of
    their paths; a copy by modality has the name of what it copies."""
    if isinstance(module, nn.Linear | LoraLayer):
        own = path[:-1] if path[-1] in ("text", "vision") else path
        return [(".".join(own[-2:]), module)]
    return [
        found
        for name, child in module.named_children()
        for found in linear_layers(child, (*path, name))
    ]


def blocks_of(module: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a part's layers, none where the part does not have layers."""
    # of a part
    blocks: Any = module.blocks() if hasattr(module, "blocks") else []  # type: ignore[operator]
    return [list(b.parameters()) if isinstance(b, nn.Module) else b for b in blocks]


def build_model(
    config: dict[str, Any],
    vocab_size: int,
    base: MultimodalLM | None = None,
    new_tokens: dict[str, int] | None = None,
) -> tuple[MultimodalLM, list[PartSummary]]:
    """The model that a configuration's `model` describes, adapters applied, and the table of what
    is trained.

    `new_tokens`, with their ids, are those that the LLM does not know (see `apply_adapters`); by
    default those behind the rows of pretrained weights. `base` is a model of these parts whose
    weights are there already. Without it, under `with torch.device("meta")`, no weight is made or
    loaded.

    Raises:
        ValueError: parts that do not fit together; the message begins with the part.
    """
    model = assemble(config, vocab_size) if base is None else base
    if base is not None:
        # how they compute is the configuration's, as for the LLM
        for name in ("vision", "connector"):
            if hasattr(getattr(base, name), "set_checkpointing"):
                getattr(base, name).set_checkpointing(
                    config[name].get("gradient_checkpointing", False)
                )
    policies = {name: build(policy) for name, policy in config["adapter"].items()}
    if new_tokens is None:
        rows = getattr(model.llm, "trained_rows", vocab_size)
        new_tokens = {f"token {index}": index for index in range(rows, vocab_size)}
    summary = apply_adapters(model, policies, new_tokens)
    if config.get("compile"):
        compile_layers(decoder_layers(model.llm), getattr(model.vision, "body", model.vision))
    # batch norms that are frozen by now keep their statistics; Lightning leaves modes alone
    model.train(model.training)
    return model, summary


def assemble(nodes: dict[str, Any], vocab_size: int) -> MultimodalLM:
    """The four parts put together, from their nodes of the configuration (`vision`, `connector`,
    `fusion`, `llm`).

    Raises:
        ValueError: parts that do not fit together; the message begins with the part.
    """
    vision = make_part("vision", nodes)
    llm = make_part("llm", nodes, vocab_size=vocab_size)
    connector = make_part(
        "connector",
        nodes,
        in_width=vision.width,
        out_width=width(llm),
        patches=vision.patches,
        grid=vision.grid,
    )
    fusion = make_part("fusion", nodes, connector_tokens=connector.tokens)
    try:
        model = MultimodalLM(vision, connector, fusion, llm)
    except ValueError as error:
        raise ValueError(f"fusion: {error}") from error
    model.nodes = {name: nodes[name] for name in PARTS}
    return model


def make_part(name: str, config: dict[str, Any], **supplied: Any) -> Any:
    """One part from its node of the configuration and what the other parts tell it."""
    arguments = {key: value for key, value in config[name].items() if not key.startswith("_")}
    try:
        return get_object(config[name]["_target_"])(**arguments, **supplied)
    except DataError as error:
        raise DataError(f"model.{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def on_meta(config: dict[str, Any], vocab_size: int) -> tuple[MultimodalLM, list[PartSummary]]:
    """`build_model` without weights: what is wrong with a configuration shows here, before
    anything is loaded."""
    with torch.device("meta"):
        return build_model(config, vocab_size)


def compile_layers(decoder: Iterable[nn.Module], body: nn.Module) -> None:
    """Has torch compile decoder layers and a timm model's blocks where they stand, each at its
    first call: names of parameters stay. A backbone that calls its blocks neither `blocks`,
    `stages` nor `layers` runs as it is."""
    blocks = next(
        (getattr(body, name) for name in ("blocks", "stages", "layers") if hasattr(body, name)), ()
    )
    for layer in (*decoder, *blocks):
        layer.compile()
