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
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from helpers import CONCAT, IMAGE, PLACEHOLDER, VOCAB, fused_llm, make_batch, of_row, visual_tokens

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
    """Weights by their names in our LLM, those that the map has no name for left out."""
    ours = {}
    for name, weight in weights.items():
        for prefix, new_prefix in names.items():
            if name.startswith(prefix):
                ours[new_prefix + name.removeprefix(prefix)] = weight
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
