"""Tiny configurations and batches made by hand.

N images in the batch, Q visual tokens per image, B rows, I the most images of a row, T text
positions, D LLM width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.adapters import PARTS
from owlfuse.model.connectors.base import Connector
from owlfuse.model.fusion.base import Fusion
from owlfuse.model.llm import load_llm
from owlfuse.model.multimodal import MultimodalLM, build_model, make_part
from owlfuse.model.vision.base import Backbone

REPO = Path(__file__).resolve().parents[2]
VOCAB = 97
PLACEHOLDER = 5
IMAGE_SIZE = 32
IMAGE = "image"

Row = list[int | str]
"""Token ids, and IMAGE where an image stands."""

ROWS: list[Row] = [
    [11, 12, IMAGE, 13, 14],
    [21, IMAGE, 22, IMAGE, 23, 24, 25],
    [31, 32, 33, 34],
    [IMAGE, IMAGE, 41],
]
"""One image, several, none, and two side by side at the start."""

SHAPE_COUNTS = {
    "train_pictures": 48,
    "val_pictures": 6,
    "held_out_pictures": 6,
    "text_train": 120,
    "text_val": 8,
}
"""A data set of shapes that is written in a moment, as arguments of `write_shapes`, and below as
overrides."""
TINY_SHAPES = [f"+data.prepare.{name}={count}" for name, count in SHAPE_COUNTS.items()]
SMALL_DATA = [*TINY_SHAPES, "data.workers=0", "data.global_batch_size=8"]
"""Overrides of a run that learns from little, in one process.

What stands behind them on the line counts.
"""
SMALL_RUN = [*SMALL_DATA, "model.vision.image_size=32"]
SHORT_ANSWERS = ["evaluation.max_questions=2", "evaluation.max_new_tokens=2"]

VIT = {
    "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
    "name": "vit_tiny_patch16_224",
    "image_size": IMAGE_SIZE,
    "kwargs": {"embed_dim": 16, "depth": 3, "num_heads": 2},
}
VIT_LEVELS = {**VIT, "levels": [0, 1], "join": "separate"}
"""The same, with the extra levels that deepstack needs."""
LINEAR = {"_target_": "owlfuse.model.connectors.linear.LinearConnector"}
HYPERATTENTION = "owlfuse.model.fusion.hyperattention.HyperAttention"
GATES = ("adaptive", "static", "fused")
MODALITY_ADAPTIVE = "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"
CONCAT = "owlfuse.model.fusion.concat.Concat"
CROSS_ATTENTION = "owlfuse.model.fusion.cross_attention.CrossAttention"
DEEPSTACK = "owlfuse.model.fusion.deepstack.DeepStack"

# every fusion, and every gate of hyperattention, whatever the yamls say
FUSIONS: dict[str, dict[str, Any]] = {
    "concat": {"_target_": CONCAT},
    "modality_adaptive": {"_target_": MODALITY_ADAPTIVE},
    **{
        f"hyperattention-{gate}": {"_target_": HYPERATTENTION, "layers": [0, 2], "gate": gate}
        for gate in GATES
    },
    "hyperattention-bare": {
        "_target_": HYPERATTENTION,
        "layers": [0, 2],
        "gate": "none",
        "norm": "own",
        "mi_rope": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "concat-bidirectional": {"_target_": CONCAT, "attention": "bidirectional"},
    "modality_adaptive-all": {
        "_target_": MODALITY_ADAPTIVE,
        "copies": ["norms", "key", "value", "query", "output", "mlp"],
    },
    "cross_attention-before-mlp": {
        "_target_": CROSS_ATTENTION,
        "layers": [0, 2],
        "mlp": True,
        "qk_norm": True,
    },
    "cross_attention-after": {
        "_target_": CROSS_ATTENTION,
        "layers": [0, 2],
        "place": "after",
        "sees": "last",
    },
    "cross_attention-parallel": {
        "_target_": CROSS_ATTENTION,
        "layers": [0, 2],
        "place": "parallel",
        "gate": "none",
    },
    "deepstack": {"_target_": DEEPSTACK},
}
"""Fusions that differ from one above in an option: what holds for every fusion is tested with them
too, but not in the fast suite."""
CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "mlp": {"_target_": "owlfuse.model.connectors.mlp.MLPConnector"},
    "abstractor": {
        "_target_": "owlfuse.model.connectors.abstractor.Abstractor",
        "queries": 4,
        "layers": 2,
        "heads": 4,
    },
}


def yaml_nodes(group: str) -> dict[str, dict[str, Any]]:
    """The yamls of `configs/model/<group>` by name, without their `defaults`; none where the
    folder is not there."""
    nodes = {}
    for path in sorted((REPO / "configs" / "model" / group).glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        node.pop("defaults", None)
        nodes[path.stem] = node
    return nodes


def all_fusions() -> dict[str, dict[str, Any]]:
    """The fusions of FUSIONS, VARIANTS and of every yaml, the layers of the latter moved into a
    tiny LLM."""
    nodes = {f"{name}.yaml": node for name, node in yaml_nodes("fusion").items()}
    for node in nodes.values():
        if "layers" in node:
            node["layers"] = FUSIONS["hyperattention-fused"]["layers"]
    return {**FUSIONS, **VARIANTS, **nodes}


def all_connectors() -> dict[str, dict[str, Any]]:
    """The connectors of CONNECTORS and of every yaml."""
    return {
        **CONNECTORS,
        **{f"{name}.yaml": node for name, node in yaml_nodes("connector").items()},
    }


def llm_fields(model_type: str = "llama", **fields: Any) -> dict[str, Any]:
    """A tiny LLM's configuration, its weights large enough for attention to matter."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        **fields,
    }


def policy(name: str, **arguments: Any) -> dict[str, Any]:
    """A node for one of the policies of `adapters`."""
    return {"_target_": f"owlfuse.model.adapters.{name}", **arguments}


FROZEN = dict.fromkeys(PARTS, policy("Frozen"))
"""Nothing is trained, for `model_node`'s `adapter`."""


def model_node(
    fusion: str | dict[str, Any] = "concat",
    llm: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    connector: dict[str, Any] | None = None,
    adapter: dict[str, dict[str, Any]] | None = None,
    **llm_arguments: Any,
) -> dict[str, Any]:
    """A configuration's `model`, everything trained unless `adapter` says otherwise of a part."""
    full = dict.fromkeys(PARTS, policy("Full"))
    if isinstance(fusion, str):
        fusion = {**FUSIONS, **VARIANTS}[fusion]
    source = {} if "pretrained" in llm_arguments else {"config": llm or llm_fields()}
    return {
        "vision": vision or (VIT_LEVELS if fusion["_target_"] == DEEPSTACK else VIT),
        "connector": connector or LINEAR,
        "fusion": fusion,
        "llm": {"_target_": "owlfuse.model.llm.load_llm", **source, **llm_arguments},
        "adapter": {**full, **(adapter or {})},
    }


def make_model(*args: Any, **kwargs: Any) -> MultimodalLM:
    """The model of a `model_node`, in evaluation mode."""
    return build_model(model_node(*args, **kwargs), VOCAB)[0].eval()


def fused_llm(fusion: dict[str, Any], llm: dict[str, Any], tokens: int) -> MultimodalLM:
    """A model without backbone and connector, for visual tokens given by hand."""
    parts = {"fusion": fusion, "llm": {"_target_": "owlfuse.model.llm.load_llm", "config": llm}}
    attached: Fusion = make_part("fusion", parts, connector_tokens=tokens)
    loaded: PreTrainedModel = make_part("llm", parts, vocab_size=VOCAB)
    return MultimodalLM(backbone_for(fusion), Connector(), attached, loaded).eval()


def backbone_for(fusion: dict[str, Any]) -> Backbone:
    """A backbone that computes nothing, with the extra levels of `visual_tokens` where the fusion
    reads them."""
    vision = Backbone()
    if fusion["_target_"] == DEEPSTACK:
        vision.extra_levels = 2
    return vision


def plain_llm(model: MultimodalLM, llm: dict[str, Any]) -> PreTrainedModel:
    """The LLM that the model's was before the fusion was attached, with the model's weights of
    it."""
    plain = load_llm(VOCAB, config=llm).eval()
    weights = {name.replace(".text.", "."): value for name, value in model.llm.state_dict().items()}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


@torch.no_grad()
def perturb(parameters: Iterator[Tensor], scale: float = 0.2) -> None:
    """Moves every number, so that no copy, gate, norm or bias is at a value that hides a
    mistake."""
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * scale)


def fusion_parameters(model: MultimodalLM) -> dict[str, Tensor]:
    """The fusion's parameters by name, found by their modules and not by `MultimodalLM.part`."""
    inside = ("visual.", "vision.")
    return {
        name: p
        for name, p in model.llm.named_parameters()
        if any(f".{word}" in name for word in inside)
    }


def make_batch(
    rows: list[Row], tokens_per_image: int = 1, left: bool = False, length: int | None = None
) -> Batch:
    """A padded batch. Text is supervised from the second token of a row on."""
    expanded = [expand(row, tokens_per_image) for row in rows]
    length = length or max(len(ids) for ids, _, _ in expanded)
    most = max(1, *(len(starts) for _, _, starts in expanded), 0)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    placeholder = torch.zeros_like(input_ids, dtype=torch.bool)
    image_index = torch.full((len(rows), most), -1)
    image_positions = torch.full((len(rows), most), length)
    count = 0
    for b, (ids, holds, starts) in enumerate(expanded):
        first = length - len(ids) if left else 0
        for t, (token, hold) in enumerate(zip(ids, holds)):
            input_ids[b, first + t], attention_mask[b, first + t], placeholder[b, first + t] = (
                token,
                1,
                hold,
            )
            if t and not hold:
                labels[b, first + t] = token
        for i, start in enumerate(starts):
            image_index[b, i], image_positions[b, i] = count, first + start
            count += 1
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randn(max(count, 1), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * (
        count > 0
    )
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        placeholder=placeholder,
        pixel_values=pixels,
        image_mask=torch.full((max(count, 1),), count > 0),
        image_index=image_index,
        image_positions=image_positions,
        has_images=count > 0,
    )


def expand(row: Row, tokens_per_image: int) -> tuple[list[int], list[bool], list[int]]:
    """Ids, which of them are placeholders, and where each image starts."""
    ids, holds, starts = [], [], []
    for token in row:
        if token == IMAGE:
            starts.append(len(ids))
        ids += [PLACEHOLDER] * tokens_per_image if token == IMAGE else [token]
        holds += [token == IMAGE] * (len(ids) - len(holds))
    return ids, holds, starts


def visual_tokens(batch: Batch, tokens: Tensor) -> VisualTokens:
    """Visual tokens (N, Q, D) given by hand, where the batch has its images, and two extra levels
    of them for deepstack."""
    levels = torch.stack([tokens.roll(1, -1), tokens.flip(-1) / 2])
    return VisualTokens(tokens, batch.image_index, batch.image_positions, levels)


def of_row(values: Tensor, batch: Batch, row: int) -> Tensor:
    """`values` (B, T, ...) of a row, without its padding."""
    return values[row][batch.attention_mask[row].bool()]


def images_of(batch: Batch, row: int) -> list[int]:
    """Which of the batch's images a row has."""
    return [i for i in batch.image_index[row].tolist() if i >= 0]


def alone(batch: Batch, row: int, rows: list[Row], tokens_per_image: int) -> Batch:
    """A batch of one of the rows, without padding and with that row's own pictures."""
    single = make_batch([rows[row]], tokens_per_image)
    if single.has_images:
        single.pixel_values = batch.pixel_values[images_of(batch, row)]
    return single


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the supervised tokens."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten()
    )


def losses_of_steps(model: MultimodalLM, optimizer: torch.optim.Optimizer, steps: int) -> list:
    """The losses of so many steps on ROWS, and the loss after them."""
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(batch), batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, loss_of(model(batch), batch).item()]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """The gradient of each trained parameter by name, the model's own left empty."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def each(nodes: dict[str, Any]) -> pytest.MarkDecorator:
    """`@each(nodes)` runs a test for every node, under its name, as its argument `node`; with those
    of VARIANTS it is slow."""
    parameters = []
    for name, node in nodes.items():
        marks = [pytest.mark.slow] if name in VARIANTS else []
        parameters.append(pytest.param(node, id=name, marks=marks))
    return pytest.mark.parametrize("node", parameters)
