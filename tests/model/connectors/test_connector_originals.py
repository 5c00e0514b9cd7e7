"""Connectors against transformers' models that have them: with the original's weights, copied by a
written map of names, owlfuse's model with `concat` gives the original's logits.

N images, P patches, Dv vision width, B rows, I images of a row, T text positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Gemma3Config,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from helpers import IMAGE, PLACEHOLDER, VOCAB, llm_fields, make_batch, perturb
from owlfuse.model.connectors.base import Connector
from owlfuse.model.connectors.pixel_shuffle import PixelShuffleConnector
from owlfuse.model.connectors.pool import PoolConnector
from owlfuse.model.connectors.qformer import QFormer
from owlfuse.model.connectors.resampler import Resampler
from owlfuse.model.fusion.concat import Concat
from owlfuse.model.llm import load_llm
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.vision.base import Backbone

ROWS = [[11, 12, IMAGE, 13, 14, IMAGE, 15], [21, IMAGE, IMAGE, 22]]
"""Two images in each row, as the Idefics take them."""
WIDTH = 16
"""Dv of the originals."""
TEXT = {**llm_fields(), "vocab_size": VOCAB, "pad_token_id": 0}
VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 8,
    "initializer_range": 0.3,
}
IDS = {"image_token_id": PLACEHOLDER}


class OriginalVision(Backbone):
    """An original's own backbone, so that the connector alone is under test."""

    def __init__(self, features: Callable[[Tensor], Tensor], patches: int, side: int) -> None:
        super().__init__()
        self.features = features
        self.width, self.patches, self.grid = WIDTH, patches, (side, side)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, P, Dv)."""
        return self.features(pixels)


def by_map(
    names: dict[str, str], original: nn.Module, connector: Connector, prefix: str = ""
) -> None:
    """Copies an original's tensors into a connector, whose every tensor has to be in the map.

    Args:
        names: beginnings of the connector's names -> those of the original's, behind the prefix.
    """
    weights = original.state_dict()
    renamed = {}
    for name in connector.state_dict():
        ours = max((key for key in names if name.startswith(key)), key=len)
        renamed[name] = weights[prefix + names[ours] + name.removeprefix(ours)]
    connector.load_state_dict(renamed)


RESAMPLER_NAMES = {
    "latents": "perceiver_resampler.latents",
    "projection.gate": "modality_projection.gate_proj",
    "projection.up": "modality_projection.up_proj",
    "projection.down": "modality_projection.down_proj",
    "final_norm": "perceiver_resampler.norm",
}
RESAMPLER_LAYER_NAMES = {
    "latents_norm": "input_latents_norm",
    "image_norm": "input_context_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
QFORMER_NAMES = {
    "queries": "query_tokens",
    "query_norm": "qformer.layernorm",
    "proj": "language_projection",
}
QFORMER_LAYER_NAMES = {
    "up": "intermediate_query.dense",
    "down": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
}
for ours, theirs in (("self_attention", "attention"), ("cross_attention", "crossattention")):
    for projection in ("query", "key", "value"):
        QFORMER_LAYER_NAMES[f"{ours}.{projection}"] = f"{theirs}.attention.{projection}"
    QFORMER_LAYER_NAMES[f"{ours}.out"] = f"{theirs}.output.dense"
    QFORMER_LAYER_NAMES[f"{ours}.norm"] = f"{theirs}.output.LayerNorm"


def with_layers(
    names: dict[str, str], layer_names: dict[str, str], layers: str, count: int
) -> dict[str, str]:
    """The names with those of every layer, the original's under `layers`."""
    full = dict(names)
    for index in range(count):
        for ours, theirs in layer_names.items():
            full[f"layers.{index}.{ours}"] = f"{layers}.{index}.{theirs}"
    return full


@dataclass
class Case:
    """An original, and owlfuse's parts with its weights."""

    original: Any
    vision: Backbone
    connector: Connector
    text_names: str
    """What stands before the names of the original's text model."""
    images_by_row: bool = False
    """Its pixels are (B, I, 3, H, W)."""


def perturbed(original: nn.Module) -> nn.Module:
    """The original with no norm, bias or query at a value that hides a mistake."""
    perturb(original.parameters())
    return original.eval()


def idefics3(side: int = 4, factor: int = 2) -> Case:
    """Idefics3, whose connector SmolVLM and nanoVLM have, too."""
    config = Idefics3Config(
        vision_config={**VISION, "image_size": 8 * side},
        text_config=dict(TEXT),
        scale_factor=factor,
        **IDS,
    )
    original: Any = perturbed(Idefics3ForConditionalGeneration(config))
    tower = original.model.vision_model
    vision = OriginalVision(lambda pixels: tower(pixels).last_hidden_state, side * side, side)
    arguments = {"factor": factor, "depth": 1, "norm": False, "bias": False}
    connector = PixelShuffleConnector(WIDTH, 32, side * side, (side, side), **arguments)
    by_map({"layers.1": "modality_projection.proj"}, original.model.connector, connector)
    return Case(original, vision, connector, "model.text_model.", images_by_row=True)


def internvl(side: int = 4, factor: int = 2) -> Case:
    """InternVL, whose class token its connector leaves out."""
    size = 8 * side
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [size, size], "patch_size": [8, 8]},
        text_config={**TEXT, "model_type": "qwen2"},
        downsample_ratio=1 / factor,
        **IDS,
    )
    original: Any = perturbed(InternVLForConditionalGeneration(config))
    tower = original.model.vision_tower
    vision = OriginalVision(lambda pixels: tower(pixels).last_hidden_state, side * side + 1, side)
    connector = PixelShuffleConnector(WIDTH, 32, side * side + 1, (side, side), factor=factor)
    names = {"layers.0": "layer_norm", "layers.1": "linear_1", "layers.3": "linear_2"}
    by_map(names, original.model.multi_modal_projector, connector)
    return Case(original, vision, connector, "model.language_model.")


def idefics2(side: int = 4, queries: int = 5, heads: int = 4, kv_heads: int = 2) -> Case:
    """Idefics2."""
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": queries,
        "resampler_depth": 2,
        "resampler_n_heads": heads,
        "resampler_head_dim": 6,
        "num_key_value_heads": kv_heads,
        "initializer_range": 0.3,
    }
    config = Idefics2Config(
        vision_config={**VISION, "image_size": 8 * side},
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        perceiver_config=perceiver,
        **IDS,
    )
    original: Any = perturbed(Idefics2ForConditionalGeneration(config))
    tower = original.model.vision_model
    vision = OriginalVision(lambda pixels: tower(pixels).last_hidden_state, side * side, side)
    connector = Resampler(
        WIDTH,
        32,
        side * side,
        (side, side),
        queries=queries,
        layers=2,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=6,
        hidden=TEXT["intermediate_size"],
    )
    names = with_layers(RESAMPLER_NAMES, RESAMPLER_LAYER_NAMES, "perceiver_resampler.layers", 2)
    by_map(names, original.model.connector, connector)
    return Case(original, vision, connector, "model.text_model.", images_by_row=True)


def blip2(side: int = 4, queries: int = 5, heads: int = 2, cross_every: int = 2) -> Case:
    """BLIP-2, whose class token its Q-Former reads."""
    qformer = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "intermediate_size": 36,
        "cross_attention_frequency": cross_every,
        "initializer_range": 0.3,
    }
    config = Blip2Config(
        vision_config={**VISION, "image_size": 8 * side},
        qformer_config=qformer,
        text_config=dict(TEXT),
        num_query_tokens=queries,
        image_token_index=PLACEHOLDER,
    )
    original: Any = perturbed(Blip2ForConditionalGeneration(config))
    tower = original.vision_model
    vision = OriginalVision(lambda pixels: tower(pixels).last_hidden_state, side * side + 1, side)
    connector = QFormer(
        WIDTH,
        32,
        side * side + 1,
        (side, side),
        queries=queries,
        layers=3,
        heads=heads,
        width=24,
        hidden=36,
        cross_every=cross_every,
    )
    names = with_layers(QFORMER_NAMES, QFORMER_LAYER_NAMES, "qformer.encoder.layer", 3)
    by_map(names, original, connector)
    return Case(original, vision, connector, "language_model.model.")


def perception_lm(side: int = 4, factor: int = 2) -> Case:
    """PerceptionLM, whose averages adapt: 5 rows of patches become 2."""
    model_args = {
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": 2,
        "img_size": 8 * side,
        "patch_size": 8,
        "global_pool": "",
    }
    config = PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": model_args,
            "do_pooling": False,
        },
        text_config=dict(TEXT),
        projector_pooling_ratio=factor,
        video_token_id=6,
        **IDS,
    )
    original: Any = perturbed(PerceptionLMForConditionalGeneration(config))
    tower = original.model.vision_tower
    vision = OriginalVision(lambda pixels: tower(pixels).last_hidden_state, side * side + 1, side)
    connector = PoolConnector(
        WIDTH,
        32,
        side * side + 1,
        (side, side),
        size=side // factor,
        pool="after",
        norm="none",
    )
    names = {"layers.1": "linear_1", "layers.3": "linear_2"}
    by_map(names, original.model.multi_modal_projector, connector)
    return Case(original, vision, connector, "model.language_model.", images_by_row=True)


CASES = {
    "idefics3": idefics3,
    "idefics3-3x3": lambda: idefics3(side=6, factor=3),
    "internvl": internvl,
    "internvl-larger": lambda: internvl(side=6),
    "idefics2": idefics2,
    "idefics2-one-kv-head": lambda: idefics2(side=3, queries=2, heads=3, kv_heads=1),
    "blip2": blip2,
    "blip2-every-third": lambda: blip2(side=3, queries=3, heads=4, cross_every=3),
    "perception_lm": perception_lm,
    "perception_lm-uneven": lambda: perception_lm(side=5),
}


def joined(case: Case) -> MultimodalLM:
    """Owlfuse's model of the case's parts, with the original's LLM."""
    text_config: PreTrainedConfig = case.original.config.get_text_config()
    fields = {**TEXT, "model_type": text_config.model_type}
    if text_config.model_type == "mistral":
        fields["sliding_window"] = None
    llm = load_llm(VOCAB, config=fields)
    weights = case.original.state_dict()
    renamed = {}
    for name in llm.state_dict():
        theirs = case.text_names + name.removeprefix("model.")
        # the head stands beside the text model
        head = "language_model.lm_head.weight" if "language_model.model" in theirs else name
        renamed[name] = weights[head if name.startswith("lm_head") else theirs]
    llm.load_state_dict(renamed)
    return MultimodalLM(case.vision, case.connector, Concat(case.connector.tokens), llm).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_original_with_its_weights(case):
    case = CASES[case]()
    model = joined(case)
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    side = case.vision.grid[0] * 8
    batch.pixel_values = torch.randn(4, 3, side, side)
    pixels = batch.pixel_values.view(2, 2, 3, side, side) if case.images_by_row else None
    expected = case.original(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values if pixels is None else pixels,
    ).logits
    got = model(batch)
    shown = batch.attention_mask.bool()
    torch.testing.assert_close(got[shown], expected[shown], rtol=0, atol=1e-4)
    # so that the tolerance means something: other pictures give other logits
    batch.pixel_values = batch.pixel_values.flip(0)
    assert (model(batch)[shown] - expected[shown]).abs().max() > 1e-2


@pytest.mark.parametrize(("side", "size"), [(4, 2), (6, 2), (4, 4)])
@torch.no_grad()
def test_pool_gives_gemma_3s_tokens_with_its_weights(side, size):
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 8 * side},
        text_config={"hidden_size": 24, "num_hidden_layers": 1},
        mm_tokens_per_image=size * size,
    )
    original = perturbed(Gemma3MultiModalProjector(config))
    connector = PoolConnector(
        WIDTH, 24, side * side, (side, side), size=size, norm="rms", depth=1, bias=False
    )
    # Gemma's norms multiply by 1 + weight, and its matrix stands the other way
    connector.load_state_dict(
        {
            "layers.0.weight": 1 + original.mm_soft_emb_norm.weight,
            "layers.1.weight": original.mm_input_projection_weight.T,
        }
    )
    features = torch.randn(3, side * side, WIDTH)
    torch.testing.assert_close(connector(features), original(features), rtol=0, atol=1e-5)
