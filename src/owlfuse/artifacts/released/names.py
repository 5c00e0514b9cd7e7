"""How the tensors of a released file correspond to those of owlfuse's model.

P patches, Dv vision width, H heads, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

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
HF_CLIP_NAMES = SIGLIP_NAMES | {
    "cls_token": "embeddings.class_embedding",
    "norm_pre": "pre_layrnorm",  # so it is spelled
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
    "llava": {
        "vision": "vision_tower.vision_model.",
        "connector": "multi_modal_projector.linear_",
        "llm": "language_model.",
    },
}


View = Callable[[Tensor], Tensor]
"""Of a tensor of the model, the view that holds a released tensor's numbers in their order."""


def identity(tensor: Tensor) -> Tensor:
    """Returns the tensor itself."""
    return tensor


def only_row(tensor: Tensor) -> Tensor:
    """(1, 1, Dv) -> (Dv,)."""
    return tensor[0, 0]


def first_row(tensor: Tensor) -> Tensor:
    """(1, P, Dv) -> (P, Dv)."""
    return tensor[0]


def third(index: int, tensor: Tensor) -> Tensor:
    """Returns the query's, key's or value's part of timm's joint projection (3 * H * d, ...)."""
    return tensor.chunk(3)[index]


def by_head(heads: int, tensor: Tensor) -> Tensor:
    """Returns timm's joint projection [q; k; v], (3 * H * d, ...), in the order of mPLUG-Owl1 and
    2, per head [q; k; v]: (H, 3, d, ...)."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1)


@dataclass(frozen=True)
class TensorMapping:
    """How a released tensor corresponds to one of the model."""

    name: str
    """In the model's state dict."""
    shape: tuple[int, ...]
    """The released tensor's."""
    view: View = identity

    def write(self, tensor: Tensor, released: Tensor) -> None:
        """Copies the released tensor into the model's, in the model's type."""
        view = self.view(tensor)
        view.copy_(released.reshape(view.shape))

    def read(self, tensor: Tensor) -> Tensor:
        """Returns the released tensor, from the model's."""
        return self.view(tensor).reshape(self.shape)


def published_name(family: str, name: str) -> str:
    """Returns a tensor's name as on the hub. transformers has moved LLaVA's modules since, and a
    folder that it wrote may have the names of any of its versions."""
    if family != "llava":
        return name
    if name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "model.language_")):
        name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    part, _, inner_name = name.partition(".")
    if part == "vision_tower" and not inner_name.startswith("vision_model."):
        return f"{part}.vision_model.{inner_name}"
    if part == "language_model" and not inner_name.startswith(("model.", "lm_head.")):
        return f"{part}.model.{inner_name}"
    return name


def tensor_mappings(
    model: MultimodalLM, family: str, file_names: Iterable[str]
) -> dict[str, TensorMapping]:
    """Returns the mapping of every tensor of the model's state dict by its released name. A tensor
    may be released under several names.

    Args:
        file_names: of the tensors of the released folder, which may differ from the hub's (see
            `published_name`).

    Raises:
        DataError: a tensor that no released model of the family has; the message begins with the
            part.
    """
    mappings = {}
    name_in_files = {published_name(family, name): name for name in file_names}
    names_by_part = {"vision": vision_names, "connector": connector_names, "llm": llm_names}
    for part, released_names in names_by_part.items():
        prefix = PREFIXES[family][part]
        state = getattr(model, part).state_dict()
        for name, tensor in state.items():
            try:
                names_and_views = list(released_names(model, family, name))
            except KeyError:
                raise DataError(
                    f"{part}: a released {family} has no {name}; merge adapters, or load the "
                    "model anew"
                ) from None
            for released, view in names_and_views:
                by_heads = isinstance(view, partial) and view.func is by_head
                # by_head only permutes, and its view is no longer two-dimensional
                shape = tensor.shape if by_heads else view(tensor).shape
                # mPLUG-Owl1's queries stand outside of its abstractor
                full_name = released if released == "query_tokens" else prefix + released
                file_name = name_in_files.get(full_name, full_name)
                mappings[file_name] = TensorMapping(f"{part}.{name}", tuple(shape), view)
    return mappings


NamesAndViews = Iterator[tuple[str, View]]
"""Released names without their prefix, and the view of the model's tensor."""


def vision_names(model: MultimodalLM, family: str, name: str) -> NamesAndViews:
    """Yields those of `TimmBackbone`'s ViT. Raises KeyError for an unknown tensor."""
    inside, stem, kind = split(name, r"body\.(blocks\.\d+\.)?")
    # timm's blocks.3. -> encoder.layers.3.
    layer = inside.replace("blocks", "encoder.layers")
    # one row by itself in transformers' CLIP, and (1, 1, Dv) in timm
    if family == "llava" and stem == "cls_token":
        yield HF_CLIP_NAMES[stem], only_row
    elif family in ("owl3", "llava"):
        names = SIGLIP_NAMES if family == "owl3" else HF_CLIP_NAMES
        released = layer + names[stem] + kind
        if stem == "attn.qkv":
            # timm has one projection for the three
            for index, letter in enumerate("qkv"):
                yield released.format(letter), partial(third, index)
        else:
            yield released, first_row if stem == "pos_embed" else identity
    else:
        view: View = identity
        if stem == "attn.qkv":
            body: Any = model.vision.inner_model()
            view = partial(by_head, body.blocks[0].attn.num_heads)
        yield layer + CLIP_NAMES[stem] + kind, view


def connector_names(model: MultimodalLM, family: str, name: str) -> NamesAndViews:
    """Yields those of the abstractor, or of mPLUG-Owl3's and LLaVA's linear layers. Raises KeyError
    for an unknown tensor."""
    if family == "llava":
        _, stem, kind = split(name, r"(layers\.)")
        # an Identity in the place of a norm comes first, and a GELU between the two
        yield {"1": "1", "3": "2"}[stem] + kind, identity
        return
    if family == "owl3":
        _, stem, kind = split(name, r"(layers\.)?")
        # an MLP's first module is its norm, which none has
        if stem != "proj" and (not stem.isdecimal() or stem == "0"):
            raise KeyError(name)
        yield ("" if stem == "proj" else f".{int(stem) - 1}") + kind, identity
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
        for index in range(len(model.connector.blocks())):
            yield f"encoder.layers.{index}.crossattention.attention.{table}", identity
    elif layer:
        yield f"encoder.{layer}crossattention.{ABSTRACTOR_NAMES[stem]}{kind}", identity
    else:
        yield outside[name], identity


def llm_names(model: MultimodalLM, family: str, name: str) -> NamesAndViews:
    """Yields those of a causal LM with its fusion inside. Raises KeyError for an adapter's."""
    if "lora_" in name or ".base_layer." in name:
        raise KeyError(name)
    # in order: `visual.kv_proj` before `visual`
    for inside, released in LLM_NAMES:
        name = name.replace(inside, released)
    yield name, identity


def split(name: str, beginning: str) -> tuple[str, str, str]:
    """`body.blocks.3.norm1.weight` -> the group of `beginning` (`blocks.3.`), `norm1`,
    `.weight`."""
    match = re.fullmatch(beginning + r"(.+?)(\.weight|\.bias)?", name)
    if match is None:
        raise KeyError(name)
    return match[1] or "", match[2], match[3] or ""


def unused_names(family: str, vision_layers: int) -> re.Pattern[str]:
    """Returns a pattern of full names that released files carry and nobody reads: rotary
    frequencies, position ids, and of SigLIP and LLaVA's CLIP the pooling head, last block and last
    norm, since features are taken before them."""
    kinds = [r".*rotary_emb\.inv_freq", r".*position_ids"]
    beginnings = {"owl3": r"vision_model\.", "llava": r"(model\.)?vision_tower\.(vision_model\.)?"}
    if family in beginnings:
        unused = rf"head\..*|post_layernorm\..*|encoder\.layers\.{vision_layers - 1}\..*"
        kinds.append(rf"{beginnings[family]}({unused})")
    return re.compile("|".join(kinds))


def optional_name(model: MultimodalLM, family: str) -> str | None:
    """Returns the released name that a file need not have: the output layer's, where the LLM's is
    its embedding."""
    # by identity: a file may hold a tied weight twice
    tied = model.llm.get_output_embeddings().weight is model.llm.get_input_embeddings().weight
    return PREFIXES[family]["llm"] + "lm_head.weight" if tied else None


FUSIONS = {"owl1": Concat, "owl2": ModalityAdaptive, "owl3": HyperAttention, "llava": Concat}
OTHER_LAYOUT = "export it in owlfuse's own layout"
"""What to do instead, in errors."""


def family_in(model: MultimodalLM) -> str:
    """Returns owl1, owl2, owl3 or llava: the family that the model came from, or the first with its
    fusion. Raises DataError for another fusion."""
    fusion_class = type(model.fusion)
    families = [name for name, expected in FUSIONS.items() if fusion_class is expected]
    if not families:
        raise DataError(
            f"fusion: {fusion_class.__name__} is that of no released mPLUG-Owl; {OTHER_LAYOUT}"
        )
    origin = model.released.family if model.released is not None else None
    return origin if origin in families else families[0]
