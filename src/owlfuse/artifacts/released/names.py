"""Where the tensors of a released file stand in owlfuse's model.

P patches, Dv vision width, H heads, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.model.fusion.concat import Concat
from owlfuse.model.fusion.hyperattention import HyperAttention
from owlfuse.model.fusion.modality_adaptive import ModalityAdaptive
from owlfuse.model.multimodal import MultimodalLM

CLIP_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embed",
    "norm_pre": "embeddings.pre_layernorm",
    "norm": "post_layernorm",
    "norm1": "input_layernorm",
    "attn.qkv": "self_attn.query_key_value",
    "attn.proj": "self_attn.dense",
    "norm2": "post_attention_layernorm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SIGLIP_NAMES = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.{}_proj",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ABSTRACTOR_NAMES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "query_norm": "norm1",
    "image_norm": "normk",
    "out": "output.out_proj",
    "mlp_norm": "output.norm2",
    "mlp.w1": "output.mlp.w1",
    "mlp.w2": "output.mlp.w2",
    "mlp.w3": "output.mlp.w3",
    "mlp.norm": "output.mlp.ffn_ln",
}
LLM_NAMES = (
    (".text.", ".multiway.0."),
    (".vision.", ".multiway.1."),
    (".self_attn.visual.kv_proj.", ".self_attn.v_kv_proj."),
    (".self_attn.visual.", ".self_attn."),
)
PREFIXES = {
    "owl1": {"vision": "vision_model.", "connector": "abstractor.", "llm": "language_model."},
    "owl2": {"vision": "model.vision_model.", "connector": "model.visual_abstractor.", "llm": ""},
    "owl3": {"vision": "vision_model.", "connector": "vision2text_model", "llm": "language_model."},
}


def whole(ours: Tensor) -> Tensor:
    """All of our tensor."""
    return ours


def first(ours: Tensor) -> Tensor:
    """(1, P, Dv) -> (P, Dv)."""
    return ours[0]


def third(index: int, ours: Tensor) -> Tensor:
    """The query's, key's or value's part of timm's joint projection (3 * H * d, ...)."""
    return ours.chunk(3)[index]


def by_head(heads: int, ours: Tensor) -> Tensor:
    """timm's joint projection [q; k; v], (3 * H * d, ...), in the order of mPLUG-Owl1 and 2, per
    head [q; k; v]: (H, 3, d, ...)."""
    return ours.unflatten(0, (3, heads, -1)).transpose(0, 1)


@dataclass(frozen=True)
class Place:
    """Where a released tensor stands."""

    name: str
    """Of our tensor, in the model's state dict."""
    shape: tuple[int, ...]
    """The released tensor's."""
    part: Callable[[Tensor], Tensor] = whole
    """The view of our tensor that holds the released numbers in their order."""

    def put(self, ours: Tensor, released: Tensor) -> None:
        """Copies the released tensor into ours, in our type."""
        view = self.part(ours)
        view.copy_(released.reshape(view.shape))

    def take(self, ours: Tensor) -> Tensor:
        """The released tensor."""
        return self.part(ours).reshape(self.shape)


def places_of(model: MultimodalLM, family: str) -> dict[str, Place]:
    """Released name -> place, for every tensor of the model's state dict. One of ours may be
    released under several names.

    Raises:
        DataError: a tensor that no released model of the family has; the message begins with the
            part.
    """
    places = {}
    for part, tensors in (
        ("vision", vision_tensors),
        ("connector", connector_tensors),
        ("llm", llm_tensors),
    ):
        prefix = PREFIXES[family][part]
        state = getattr(model, part).state_dict()
        for name, ours in state.items():
            try:
                found = list(tensors(model, family, name, ours))
            except KeyError:
                raise DataError(
                    f"{part}: a released {family} has no {name}; merge adapters, or load the "
                    "model anew"
                ) from None
            for released, view in found:
                shape = (
                    ours.shape
                    if isinstance(view, partial) and view.func is by_head
                    else view(ours).shape
                )
                outside = "" if released == "query_tokens" else prefix
                places[outside + released] = Place(f"{part}.{name}", tuple(shape), view)
    return places


Named = Iterator[tuple[str, Callable[[Tensor], Tensor]]]
"""Released names without their prefix, and the view of our tensor."""


def vision_tensors(model: MultimodalLM, family: str, name: str, ours: Tensor) -> Named:
    """Those of `TimmBackbone`'s ViT. KeyError for an unknown one."""
    inside, stem, kind = split(name, r"body\.(blocks\.\d+\.)?")
    layer = inside.replace("blocks", "encoder.layers")
    if family == "owl3":
        released = layer + SIGLIP_NAMES[stem] + kind
        if stem == "attn.qkv":
            yield from (
                (released.format(letter), partial(third, i)) for i, letter in enumerate("qkv")
            )
        else:
            yield released, first if stem == "pos_embed" else whole
    else:
        view = (
            partial(by_head, model.vision.body.blocks[0].attn.num_heads)
            if stem == "attn.qkv"
            else whole
        )
        yield layer + CLIP_NAMES[stem] + kind, view


def connector_tensors(model: MultimodalLM, family: str, name: str, ours: Tensor) -> Named:
    """Those of the abstractor, or of mPLUG-Owl3's linear layers. KeyError for an unknown one."""
    if family == "owl3":
        _, stem, kind = split(name, r"(layers\.)?")
        # an MLP's first module is its norm, which none has
        if stem != "proj" and (not stem.isdecimal() or stem == "0"):
            raise KeyError(name)
        yield ("" if stem == "proj" else f".{int(stem) - 1}") + kind, whole
        return
    outside = {
        "queries": "query_tokens" if family == "owl1" else "query_embeds",
        "end_token": "vit_eos",
        "proj.weight": "visual_fc.weight",
        "proj.bias": "visual_fc.bias",
    }
    layer, stem, kind = split(name, r"(layers\.\d+\.)?")
    if name in ("query_positions", "image_positions"):
        table = "q_pos_embed" if name == "query_positions" else "k_pos_embed"
        for index in range(len(model.connector.layers)):
            yield f"encoder.layers.{index}.crossattention.attention.{table}", whole
    elif layer:
        yield f"encoder.{layer}crossattention.{ABSTRACTOR_NAMES[stem]}{kind}", whole
    else:
        yield outside[name], whole


def llm_tensors(model: MultimodalLM, family: str, name: str, ours: Tensor) -> Named:
    """Those of a causal LM with its fusion inside. KeyError for one of an adapter."""
    if "lora_" in name or ".base_layer." in name:
        raise KeyError(name)
    for inside, released in LLM_NAMES:
        name = name.replace(inside, released)
    yield name, whole


def split(name: str, beginning: str) -> tuple[str, str, str]:
    """`body.blocks.3.norm1.weight` -> the group of `beginning` (`blocks.3.`), `norm1`,
    `.weight`."""
    found = re.fullmatch(beginning + r"(.+?)(\.weight|\.bias)?", name)
    if found is None:
        raise KeyError(name)
    return found[1] or "", found[2], found[3] or ""


def unused(family: str, vision_layers: int) -> re.Pattern[str]:
    """Full names that released files carry and nobody reads: rotary frequencies, position ids, and
    of SigLIP its pooling head, last block and last norm, since features are taken before them."""
    kinds = [r".*rotary_emb\.inv_freq", r".*position_ids"]
    if family == "owl3":
        kinds.append(
            rf"vision_model\.(head\..*|post_layernorm\..*|encoder\.layers\.{vision_layers - 1}\..*)"
        )
    return re.compile("|".join(kinds))


def optional(model: MultimodalLM, family: str) -> str | None:
    """The released name that a file need not have: the output layer's, where the LLM's is its
    embedding."""
    tied = model.llm.get_output_embeddings().weight is model.llm.get_input_embeddings().weight
    return PREFIXES[family]["llm"] + "lm_head.weight" if tied else None


FUSIONS = {Concat: "owl1", ModalityAdaptive: "owl2", HyperAttention: "owl3"}


ELSE = "export it in owlfuse's own layout"


def family_in(model: MultimodalLM) -> str:
    """owl1, owl2 or owl3, by the model's fusion. Raises DataError for a fusion of none."""
    kind = type(model.fusion)
    if kind not in FUSIONS:
        raise DataError(f"fusion: {kind.__name__} is that of no released mPLUG-Owl; {ELSE}")
    return FUSIONS[kind]
