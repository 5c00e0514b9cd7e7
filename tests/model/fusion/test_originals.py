"""Fusions against the models of transformers that are built so: a tiny original's weights are
copied into our parts by a written map of names, its own visual features are given to both, and the
logits agree."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from helpers import (
    CONCAT,
    CROSS_ATTENTION,
    DEEPSTACK,
    IMAGE,
    PLACEHOLDER,
    VOCAB,
    fused_llm,
    make_batch,
    of_row,
    perturb,
    visual_tokens,
)
from owlfuse.core.types import VisualTokens

BIDIRECTIONAL = {"_target_": CONCAT, "attention": "bidirectional"}
PIXELS = 24
PATCH = 6
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}
TEXT_PARTS = {"model.language_model.": "model.", "lm_head.": "lm_head."}
"""Names in the originals, and in a causal LM of transformers."""
# apart, since Gemma 3 takes neighbours for one image
APART = [[11, 12, IMAGE, 13, 14, 15], [21, IMAGE, 22, 23, IMAGE, 24, 25, 26], [31, 32, 33]]


def renamed(weights, names):
    """Weights by their names in our LLM, by the first prefix of the map that fits; without those
    that it has none for."""
    ours = {}
    for name, weight in weights.items():
        for prefix, new_prefix in names.items():
            if name.startswith(prefix):
                ours[new_prefix + name.removeprefix(prefix)] = weight
                break
    return ours


def gemma3(window):
    text = {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": window}
    text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        image_token_id=PLACEHOLDER,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config), {**text, "model_type": "gemma3_text"}


def paligemma():
    text = {**TEXT, "model_type": "gemma"}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        projection_dim=32,
        hidden_size=32,
        image_token_index=PLACEHOLDER,
    )
    return PaliGemmaForConditionalGeneration(config), text


def llava():
    text = {**TEXT, "model_type": "llama"}
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=PLACEHOLDER,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), text


ORIGINALS = {
    "gemma3": (lambda: gemma3(4096), BIDIRECTIONAL, True),
    # an image of 4 tokens fits into its windows
    "gemma3-window": (lambda: gemma3(5), BIDIRECTIONAL, True),
    "paligemma": (paligemma, BIDIRECTIONAL, True),
    "llava": (llava, {"_target_": CONCAT}, False),
}


def features_of(original, pixels):
    """The projected features (N, Q, D) of pixels (N, 3, H, W)."""
    features = original.get_image_features(pixels).pooler_output
    return torch.stack(list(features)) if isinstance(features, list | tuple) else features


@pytest.mark.parametrize("name", ORIGINALS)
@torch.no_grad()
def test_concat_has_the_logits_of_the_original(name):
    make_original, node, marks_images = ORIGINALS[name]
    torch.manual_seed(5)
    original, text = make_original()
    original = original.eval()
    pixels = torch.randn(3, 3, PIXELS, PIXELS)
    tokens = features_of(original, pixels)
    # as large as the embeddings beside them
    model = fused_llm(node, text, tokens.shape[1])
    model.llm.load_state_dict(renamed(original.state_dict(), TEXT_PARTS))
    rows = [APART[0]] if name == "paligemma" else APART
    count = sum(row.count(IMAGE) for row in rows)
    batch = make_batch(rows, tokens.shape[1])
    logits = model(batch, visual_tokens(batch, tokens[:count]))
    options = {}
    if name == "paligemma":
        # its own processor has the question in the block, too
        options["token_type_ids"] = (~batch.placeholder).long()
    elif marks_images:
        options["token_type_ids"] = batch.placeholder.long()
    expected = original(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=pixels[:count],
        **options,
    ).logits
    for row in range(len(rows)):
        torch.testing.assert_close(
            of_row(logits, batch, row), of_row(expected, batch, row), rtol=1e-4, atol=1e-4
        )
    # the rows' pictures and their masks matter: another fusion has other logits
    other = {"_target_": CONCAT} if marks_images else BIDIRECTIONAL
    changed = fused_llm(other, text, tokens.shape[1])
    changed.llm.load_state_dict(model.llm.state_dict())
    difference = changed(batch, visual_tokens(batch, tokens[:count])) - logits
    assert difference[batch.attention_mask.bool()].abs().max() > 1e-3


# Llama 3.2 Vision: cross-attention


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
"""The original's default, and not Llama's."""
CROSS_LAYERS = {1: 1, 3: 2}
"""Decoder layers of the original that are cross-attention alone, and the index of our LLM's layer
that follows each."""
SELF_LAYERS = {0: 0, 2: 1, 4: 2}
BLOCK_NAMES = {
    "input_layernorm.": "norm.",
    "cross_attn.": "",
    "cross_attn_attn_gate": "gate",
    "post_attention_layernorm.": "mlp_norm.",
    "mlp.": "",
    "cross_attn_mlp_gate": "mlp_gate",
}


def mllama():
    text = {**TEXT, **ROPE, "num_hidden_layers": 5, "cross_attention_layers": list(CROSS_LAYERS)}
    del text["head_dim"]  # the original has none in its configuration
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": PIXELS,
        "patch_size": PATCH,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=PLACEHOLDER)
    return MllamaForConditionalGeneration(config)


def names_of_mllama():
    names = {}
    for layer, index in SELF_LAYERS.items():
        names[f"model.language_model.layers.{layer}."] = f"model.layers.{index}."
    for layer, index in CROSS_LAYERS.items():
        for name, block_name in BLOCK_NAMES.items():
            names[f"model.language_model.layers.{layer}.{name}"] = (
                f"model.layers.{index}.visual.{block_name}"
            )
    return {**names, **TEXT_PARTS}


@torch.no_grad()
def test_cross_attention_before_the_layer_has_the_logits_of_llama_vision():
    """Every row begins with an image: before its first image, the original's tokens see all."""
    torch.manual_seed(6)
    original = mllama().eval()
    perturb(p for name, p in original.named_parameters() if "gate" in name and "proj" not in name)
    rows = [[IMAGE, 11, 12, IMAGE, 13, 14], [IMAGE, 21, IMAGE, 22, 23]]
    batch = make_batch(rows)
    projected = []
    original.model.multi_modal_projector.register_forward_hook(
        lambda module, args, out: projected.append(out)
    )
    seen = (batch.image_positions[:, None, :] <= torch.arange(6)[:, None]).long()
    expected = original(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=torch.randn(2, 2, 1, 3, PIXELS, PIXELS),
        aspect_ratio_ids=torch.ones(2, 2, dtype=torch.long),
        aspect_ratio_mask=torch.ones(2, 2, 1, dtype=torch.long),
        cross_attention_mask=seen[..., None],
    ).logits
    tokens = projected[0].flatten(0, 2)  # one tile of each image
    node = {"_target_": CROSS_ATTENTION, "layers": [1, 2], "mlp": True, "qk_norm": True}
    model = fused_llm(node, {**TEXT, **ROPE, "model_type": "llama"}, tokens.shape[1])
    weights = renamed(original.state_dict(), names_of_mllama())
    # the original's table has eight rows more
    table = "model.embed_tokens.weight"
    weights[table] = weights[table][:VOCAB]
    model.llm.load_state_dict(weights)
    logits = model(batch, visual_tokens(batch, tokens))
    for row in range(2):
        torch.testing.assert_close(
            of_row(logits, batch, row), of_row(expected, batch, row), rtol=1e-4, atol=1e-4
        )
    without = model(batch, visual_tokens(batch, tokens * 0))
    assert (without - logits)[batch.attention_mask.bool()].abs().max() > 1e-3


# Qwen3-VL: deepstack


def qwen3_vl():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "depth": 4,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 2],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": {**rope, "mrope_section": [2, 1, 1]}}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=PLACEHOLDER)
    ours = {**TEXT, "rope_parameters": rope, "model_type": "qwen3"}
    return Qwen3VLForConditionalGeneration(config), ours


@torch.no_grad()
def test_deepstack_has_the_logits_of_qwen3_vl_where_all_axes_have_the_texts_positions():
    """Of its own, an image's patches have positions of rows and columns, which ours have not."""
    torch.manual_seed(7)
    original, text = qwen3_vl()
    original = original.eval()
    pixels = torch.randn(3 * 16, 3 * PATCH * PATCH)
    grids = torch.tensor([[1, 4, 4]] * 3)
    features = original.get_image_features(pixels, grids)
    tokens = torch.stack(features.pooler_output)
    levels = torch.stack([torch.stack(level) for level in features.deepstack_features])
    assert levels.shape == (2, 3, 4, 32)
    model = fused_llm({"_target_": DEEPSTACK}, text, 4)
    model.llm.load_state_dict(renamed(original.state_dict(), TEXT_PARTS))
    batch = make_batch(APART, 4)
    visual = VisualTokens(tokens, batch.image_index, batch.image_positions, levels)
    logits = model(batch, visual)
    expected = original(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions(),
        pixel_values=pixels,
        image_grid_thw=grids,
    ).logits
    for row in range(len(APART)):
        torch.testing.assert_close(
            of_row(logits, batch, row), of_row(expected, batch, row), rtol=1e-4, atol=1e-4
        )
    swapped = VisualTokens(tokens, batch.image_index, batch.image_positions, levels.flip(0))
    assert (model(batch, swapped) - logits)[batch.attention_mask.bool()].abs().max() > 1e-3
