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
from transformers.modeling_layers import GradientCheckpointingLayer

from owlfuse.config.build import build
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.adapters import PARTS, Part, PartSummary, apply_adapters
from owlfuse.model.connectors.base import Connector
from owlfuse.model.fusion.base import Fusion, fused_output
from owlfuse.model.fusion.probe import check_fusion
from owlfuse.model.layouts import decoder_layers, module_at, names_in_float32
from owlfuse.model.llm import (
    PER_HEAD_NORMS,
    TENSOR_ROLES,
    balancing_coefficient,
    balancing_loss,
    check_split,
    untrainable_names,
    width,
)
from owlfuse.model.llm_probe import check_packing, idle_parameters
from owlfuse.model.parts import ModelPart, named_errors
from owlfuse.model.quantization import (
    Quantization,
    check_quantized_training,
    quantize,
    quantized_sizes,
)
from owlfuse.model.vision.base import Backbone
from owlfuse.model.vision.batch_norm import trained_norms


class MultimodalLM(nn.Module):
    """A vision-language model of four parts, the fusion attached to the LLM.

    Attributes:
        nodes: the configuration of each part that the model was assembled from; None for one put
            together by hand.
        balancing_loss: of the last forward in training, how unevenly a mixture of experts used its
            experts (see `llm.balancing_loss`); None for other LLMs, and for a frozen one.
        released: an `owlfuse.artifacts.released.loading.Released`, of a model that was read from a
            released checkpoint.
    """

    nodes: dict[str, Any] | None = None
    released: Any = None

    def __init__(
        self,
        vision: Backbone,
        connector: Connector,
        fusion: Fusion,
        llm: PreTrainedModel,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.fusion = fusion
        self.llm = llm
        self.packing_checked = False
        self.balancing_loss: Tensor | None = None
        self.new_rows: dict[str, list[int]] = {}
        # no policy trains them. By module and name, since loading puts other parameters in their
        # places, and LoRA other names
        self.untrainable: list[tuple[nn.Module, str]] = []
        # `load_llm` knows those of weights that it has read
        names = untrainable_names(llm) | getattr(llm, "untrainable", set()) | idle_parameters(llm)
        for path in names:
            module_path, _, name = path.rpartition(".")
            self.untrainable.append((llm.get_submodule(module_path), name))
        # before the check, which tries the levels too
        fusion.set_levels(vision.extra_levels, connector)
        # before it is attached: a fusion that fails leaves this LLM unchanged
        check_fusion(fusion, llm)
        fusion.attach(llm)
        # an attribute of `load_llm`; after the fusion has made its copies of plain layers
        quantization: Any = getattr(llm, "quantization", None)
        if quantization is not None:
            self.quantize(quantization)

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Returns the logits (B, T, V) of a batch.

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
        # at the first packed batch alone, for models that were built by hand
        if batch.segment_ids is not None and not self.packing_checked:
            check_packing(self.llm, batch.input_ids.shape[1])
            self.packing_checked = True
        balances = self.training and self.balances_experts()
        options = {"output_router_logits": True} if balances else {}
        output = fused_output(
            self.llm,
            self.fusion,
            batch,
            visual,
            cache,
            logits_to_keep,
            **options,
        )
        # the loss of an earlier forward pass must not be added again
        self.balancing_loss = None
        if balances:
            mask = batch.attention_mask
            self.balancing_loss = balancing_loss(self.llm, output.router_logits, mask)
        return output.logits[0] if isinstance(logits_to_keep, Tensor) else output.logits

    def balances_experts(self) -> bool:
        """Returns whether the LLM is a mixture of experts with a balancing loss, and is itself
        trained, not only what a fusion has added to it."""
        if balancing_coefficient(self.llm) == 0:
            return False
        parameters = self.part("llm").parameters.items()
        # tables of which a frozen LLM trains the rows of new tokens do not count
        return any(p.requires_grad for name, p in parameters if name not in self.new_rows)

    def encode(self, batch: Batch) -> VisualTokens:
        """Returns the visual tokens (N, Q, D) of pixels (N, 3, H, W), the backbone once for all
        images of the batch.

        A batch without images passes its blank one, times zero, so that every parameter has a
        gradient and every rank issues the same collectives.
        """
        with nullcontext() if batch.has_images else self.vision.statistics_kept():
            features = self.vision(in_dtype_of(self.vision, batch.pixel_values))
        tokens, levels = self.connect(features)
        # zero for a blank image, and multiplied rather than selected, so that its gradients are
        # zero and not missing
        is_image = batch.image_mask[:, None, None].to(features.dtype)
        tokens = tokens * is_image
        if levels is not None:
            # the levels of a blank image, too, so that their connectors have gradients
            levels = levels * is_image
        return VisualTokens(tokens, batch.image_index, batch.image_positions, levels)

    def connect(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the visual tokens (N, Q, D) of features (N, P, Dv), or (N, 1 + L, P, Dv) of a
        backbone with extra levels; and those of the levels, (L, N, Q, D).

        Raises:
            ValueError: a backbone or a connector that gives other tokens than it says.
        """
        level_features: list[Tensor] = []
        if self.vision.extra_levels:
            features, *level_features = features.unbind(1)
        check_token_count("vision", self.vision, features, self.vision.patches)
        tokens = self.connector(features)
        check_token_count("connector", self.connector, tokens, self.connector.tokens)
        connectors = self.fusion.level_connectors()
        if not connectors:
            return tokens, None
        levels = []
        for connector, level in zip(connectors, level_features, strict=True):
            levels.append(connector(level))
        return tokens, torch.stack(levels)

    def set_image_size(self, image_size: int) -> None:
        """Goes on with pictures of another size, weights kept: position embeddings are resampled,
        tables computed anew.

        Raises:
            ValueError: a part that cannot; the message begins with it.
        """
        # the backbone first: connectors are given its new grid
        with named_errors("vision: image_size"):
            self.vision.set_image_size(image_size)
        with named_errors("connector"):
            for connector in (self.connector, *self.fusion.level_connectors()):
                connector.set_grid(self.vision.patches, self.vision.grid)
        self.fusion.set_connector_tokens(self.connector.tokens)
        if self.nodes is not None:
            vision = {**self.nodes["vision"], "image_size": image_size}
            self.nodes = {**self.nodes, "vision": vision}

    def part(self, name: str) -> Part:
        """Returns one of `adapters.PARTS`. Modules that the fusion put into the LLM belong to
        `fusion`."""
        if name in ("vision", "connector"):
            part: ModelPart = getattr(self, name)
            return Part(name, part, dict(part.named_parameters()), part.blocks())
        in_fusion: set[int] = set()
        for module in self.fusion.owned(self.llm):
            in_fusion.update(id(parameter) for parameter in module.parameters())
        return self.fusion_part(in_fusion) if name == "fusion" else self.llm_part(in_fusion)

    def fusion_part(self, in_fusion: set[int]) -> Part:
        """Returns the part `fusion`.

        Args:
            in_fusion: ids of the parameters that the fusion put into the LLM.
        """
        own_parameters = dict(self.fusion.named_parameters())
        # names of a part are those below its root
        if own_parameters and not in_fusion:
            return Part("fusion", self.fusion, own_parameters)
        in_llm = {}
        for name, parameter in self.llm.named_parameters():
            if id(parameter) in in_fusion:
                in_llm[name] = parameter
        return Part(
            "fusion",
            self.llm,
            {**in_llm, **own_parameters},
            quantized=quantized_sizes(self.llm, in_llm),
            closed_gates=names_of(in_llm, self.fusion.closed_gates(self.llm)),
        )

    def llm_part(self, in_fusion: set[int]) -> Part:
        """Returns the part `llm`, which is what the fusion does not own.

        Args:
            in_fusion: ids of the parameters that the fusion put into the LLM.
        """
        parameters = {}
        for name, parameter in self.llm.named_parameters():
            if id(parameter) not in in_fusion:
                parameters[name] = parameter
        blocks = []
        for layer in decoder_layers(self.llm):
            blocks.append([p for p in layer.parameters() if id(p) not in in_fusion])
        # embeddings and head are one parameter with one name where they are tied
        embeddings = (self.llm.get_input_embeddings(), self.llm.get_output_embeddings())
        tables = names_of(parameters, [table.weight for table in embeddings if table is not None])
        untrainable = [getattr(module, attribute) for module, attribute in self.untrainable]
        return Part(
            "llm",
            self.llm,
            parameters,
            blocks,
            tables={name: parameters[name] for name in parameters if name in tables},
            untrainable=names_of(parameters, untrainable),
            quantized=quantized_sizes(self.llm, parameters),
        )

    def row_limits(self) -> list[tuple[nn.Parameter, list[int]]]:
        """Returns the LLM's tables of which only some rows are trained, with those rows."""
        return [(self.llm.get_parameter(name), rows) for name, rows in self.new_rows.items()]

    def trained_count(self) -> int:
        """Returns how many numbers are trained, of the tables in `row_limits` the rows alone."""
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        for table, rows in self.row_limits():
            count -= table.numel() - len(rows) * table.shape[1]
        return count

    def quantize(self, quantization: Quantization) -> None:
        """Holds the LLM's linear layers in 4 bits, but for those that the fusion put into it."""
        quantize(self.llm, quantization, self.fusion.owned(self.llm))

    def sharding_units(self) -> list[nn.Module]:
        """Returns the modules that FSDP gathers one after the other; parameters in none of them are
        gathered for the whole forward."""
        units = list(self.vision.sharding_units())
        for connector in (self.connector, *self.fusion.level_connectors()):
            units += connector.sharding_units()
        return [*units, *decoder_layers(self.llm)]

    def check_training(self, sharded: bool) -> None:
        """Checks that the parts can be trained with their options, before a weight is made.

        Args:
            sharded: parameters are split over ranks.

        Raises:
            ValueError: a part that cannot; the message begins with it.
        """
        for name in ("vision", "connector"):
            part: ModelPart = getattr(self, name)
            with named_errors(name):
                part.check_training(sharded)
        check_quantized_training(self.llm, sharded)

    def check_start(self) -> None:
        """Checks that what has no effect before it is trained is trained, in a run that starts from
        no trained model; what a frozen backbone leaves out is logged.

        Raises:
            ValueError: pictures would never be seen.
        """
        fusion = self.part("fusion")
        gates = [fusion.parameters[name] for name in fusion.closed_gates]
        if gates and not any(gate.requires_grad for gate in gates):
            raise ValueError(
                "adapter.fusion: its gates begin closed, and frozen they stay closed, so that no "
                "picture would be seen; give full or lora, or start from a trained model by "
                "init_from"
            )
        self.vision.log_unlearned()

    def check_split(self, ranks: int) -> None:
        """Checks that so many tensor ranks can share out the LLM and what the fusion added to it.

        Raises:
            ValueError: they cannot, as where heads or hidden units are not divided.
        """
        check_split(self.llm, ranks)
        if ranks > 1:
            self.fusion.check_split(self.llm, ranks)

    def projections(self) -> list[tuple[nn.Module, str]]:
        """Returns the linear layers that tensor parallelism splits, each with its role (see
        `llm.TENSOR_ROLES`)."""
        roles = {**TENSOR_ROLES, **self.fusion.tensor_roles}
        projections = []
        for layer in decoder_layers(self.llm):
            for name, module in linear_layers(layer):
                if name in roles:
                    projections.append((module, roles[name]))
        return projections

    def per_head(self) -> list[nn.Parameter]:
        """Returns the parameters that every tensor rank has in full and uses for its own heads
        alone."""
        parameters: list[nn.Parameter] = []
        for layer in decoder_layers(self.llm):
            # tensor ranks split this attention alone, see `llm.check_split`
            attention = module_at(layer, "self_attn")
            if attention is None:
                continue
            for name, norm in attention.named_children():
                if name in PER_HEAD_NORMS:
                    parameters += norm.parameters()
        return parameters + self.fusion.per_head(self.llm)

    def _apply(self, fn: Any, recurse: bool = True) -> MultimodalLM:
        """Casts and moves as torch's, which `to` goes through, but the rotary frequencies of LLM
        and backbone keep their precision: in half of it, they would turn far positions wrongly; so
        do the weights that transformers keeps in 32 bits, as those that choose experts. A private
        name of torch's, and the one method that every way to cast goes through."""
        in_float32 = names_in_float32(self.llm)
        beside_float16 = names_in_float32(self.llm, strict=False)
        kept: list[tuple[nn.Module, str, Tensor]] = []
        for name, tensor in (*self.llm.named_parameters(), *self.llm.named_buffers()):
            if "inv_freq" in name or name in beside_float16:
                kept.append((self.llm, name, tensor.data))
        for name, buffer in self.vision.named_buffers():
            if "inv_freq" in name:
                kept.append((self.vision, name, buffer.data))
        # torch casts all of them: they are put back afterwards
        super()._apply(fn, recurse)
        for root, name, tensor in kept:
            path, _, attribute = name.rpartition(".")
            after = getattr(root.get_submodule(path), attribute)
            if name in beside_float16 - in_float32 and after.dtype != torch.float16:
                continue
            if after.element_size() < tensor.element_size():
                after.data = tensor.to(after.device)
        return self

    def train(self, mode: bool = True) -> MultimodalLM:
        """Sets modes as torch's, but a frozen backbone and a frozen LLM drop nothing, as many of
        timm's and GPT-2 would, and a batch norm whose weight is frozen keeps its statistics."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision.parameters()):
            self.vision.eval()
        tables = {id(table) for table, _ in self.row_limits()}
        llm = self.part("llm").parameters.values()
        if not any(p.requires_grad for p in llm if id(p) not in tables):
            for module in self.llm.modules():
                # a layer in evaluation would keep the activations that checkpointing frees
                module.training = mode and recomputes(module)
                if module.training:
                    drop_nothing(module)
            for module in self.fusion.owned(self.llm):
                module.train(mode)
        trained = set(trained_norms(self))
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module not in trained:
                module.eval()
        return self


def recomputes(module: nn.Module) -> bool:
    """Returns whether a module is a decoder layer that computes its activations again in the
    backward pass."""
    return isinstance(module, GradientCheckpointingLayer) and bool(module.gradient_checkpointing)


def drop_nothing(layer: nn.Module) -> None:
    """Sets the rates to 0 by which a decoder layer drops in its own forward, as OPT's does."""
    for name, value in vars(layer).items():
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)


def in_dtype_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """Returns the tensor in the dtype of a module's weights, which is a half precision in a run of
    `bf16-true`."""
    weight = next(module.parameters(), None)
    return tensor if weight is None else tensor.to(weight.dtype)


def linear_layers(module: nn.Module, path: tuple[str, ...] = ()) -> list[tuple[str, nn.Module]]:
    """Returns the linear layers below a module, LoRA's around them counted as one, with the last
    two parts of their paths; a copy by modality has the name of the layer that it copies."""
    if isinstance(module, nn.Linear | LoraLayer):
        # `k_proj.vision` has the role of `k_proj`, `mlp.vision.up_proj` that of `mlp.up_proj`
        layer_path = [name for name in path if name not in ("text", "vision")]
        return [(".".join(layer_path[-2:]), module)]
    layers = []
    for name, child in module.named_children():
        layers += linear_layers(child, (*path, name))
    return layers


def check_token_count(name: str, part: ModelPart, output: Tensor, expected: int) -> None:
    """Raises ValueError where a part's output (N, tokens, width) has other tokens than it says."""
    if output.shape[1] != expected:
        raise ValueError(
            f"{name}: {type(part).__name__} gives {output.shape[1]} tokens, and says {expected}"
        )


def build_model(
    config: dict[str, Any],
    vocab_size: int,
    base: MultimodalLM | None = None,
    new_tokens: dict[str, int] | None = None,
) -> tuple[MultimodalLM, list[PartSummary]]:
    """Returns the model that a configuration's `model` describes, adapters applied, and the counts
    of trained parameters.

    `new_tokens`, with their ids, are those that the LLM was not trained with (see
    `apply_adapters`); by default those behind the rows of pretrained weights. `base` is a model of
    these parts whose weights are loaded. Without it, under `with torch.device("meta")`, no weight
    is made or loaded.

    Raises:
        ValueError: parts that do not fit together; the message begins with the part.
    """
    model = assemble(config, vocab_size) if base is None else base
    if base is not None:
        # how the parts compute is the configuration's, as for the LLM
        parts: list[tuple[str, ModelPart]] = [("vision", base.vision)]
        # connectors of levels are copies of the model's, and have its options
        for connector in (base.connector, *base.fusion.level_connectors()):
            parts.append(("connector", connector))
        for name, part in parts:
            for option in part.COMPUTE_ONLY:
                if option in config[name]:
                    part.set_compute_option(option, config[name][option])
    # after the weights are there: LoRA starts from them
    policies = {name: build(policy) for name, policy in config["adapter"].items()}
    if new_tokens is None:
        # an attribute of `load_llm`, for pretrained weights
        rows = getattr(model.llm, "trained_rows", vocab_size)
        new_tokens = {f"token {index}": index for index in range(rows, vocab_size)}
    summary = apply_adapters(model, policies, new_tokens)
    if config.get("compile"):
        compile_layers(decoder_layers(model.llm), model.vision.compiled_blocks())
    # batch norms that are frozen by now keep their statistics; Lightning leaves modes alone
    model.train(model.training)
    return model, summary


def assemble(nodes: dict[str, Any], vocab_size: int) -> MultimodalLM:
    """Returns a model of four parts, from their nodes of the configuration (`vision`, `connector`,
    `fusion`, `llm`).

    Raises:
        ValueError: parts that do not fit together; the message begins with the part.
    """
    vision = make_part("vision", nodes)
    check_class("vision", vision, Backbone)
    llm = make_part("llm", nodes, vocab_size=vocab_size)
    # after backbone and LLM, whose widths it connects
    connector = make_part(
        "connector",
        nodes,
        in_width=vision.width,
        out_width=width(llm),
        patches=vision.patches,
        grid=vision.grid,
    )
    check_class("connector", connector, Connector)
    fusion = make_part("fusion", nodes, connector_tokens=connector.tokens)
    check_class("fusion", fusion, Fusion)
    with named_errors("fusion"):
        model = MultimodalLM(vision, connector, fusion, llm)
    # an export's config.json has them
    model.nodes = {name: nodes[name] for name in PARTS}
    return model


def make_part(name: str, config: dict[str, Any], **supplied: Any) -> Any:
    """Returns one part, from its node of the configuration and the arguments that other parts
    give."""
    # Hydra's own keys, such as `_target_`
    arguments = {key: value for key, value in config[name].items() if not key.startswith("_")}
    try:
        return get_object(config[name]["_target_"])(**arguments, **supplied)
    # before ValueError, which it is derived from
    except DataError as error:
        raise DataError(f"model.{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def names_of(parameters: dict[str, nn.Parameter], members: Iterable[Any]) -> set[str]:
    """Returns the names of those parameters that are among `members`, the same objects."""
    ids = {id(member) for member in members}
    return {name for name, parameter in parameters.items() if id(parameter) in ids}


def check_class(name: str, part: Any, base: type[nn.Module]) -> None:
    """Raises ValueError for a part that is not derived from its base class."""
    if not isinstance(part, base):
        raise ValueError(
            f"{name}: {type(part).__name__} is no {base.__name__}; derive it from "
            f"{base.__module__}.{base.__name__}"
        )


def on_meta(
    config: dict[str, Any], vocab_size: int, new_tokens: dict[str, int] | None = None
) -> tuple[MultimodalLM, list[PartSummary]]:
    """Returns `build_model` without weights, which raises for a wrong configuration before anything
    is loaded."""
    with torch.device("meta"):
        return build_model(config, vocab_size, new_tokens=new_tokens)


def compile_layers(decoder: Iterable[nn.Module], blocks: Iterable[nn.Module]) -> None:
    """Compiles decoder layers and a backbone's blocks in place, each at its first call: names of
    parameters stay. A backbone that has no blocks to give (see `Backbone.compiled_blocks`) is not
    compiled."""
    for layer in (*decoder, *blocks):
        layer.compile()
