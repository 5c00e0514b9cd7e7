"""Each fusion on each LLM against `ReferenceLM`, which is written as loops over rows, tokens and
heads."""

import pytest
import torch

from helpers import (
    CONCAT,
    CROSS_ATTENTION,
    DEEPSTACK,
    FUSIONS,
    MODALITY_ADAPTIVE,
    ROWS,
    VARIANTS,
    each,
    expand,
    fused_llm,
    fusion_parameters,
    images_of,
    llm_fields,
    make_batch,
    of_row,
    perturb,
    visual_tokens,
)
from reference_lm import ReferenceLM, Shape

TOKENS = 3  # visual tokens of an image

LLMS = {
    "llama": llm_fields("llama"),
    "llama-4-kv-heads-biases": llm_fields("llama", num_key_value_heads=4, attention_bias=True),
    "mistral-wide-heads": llm_fields("mistral", head_dim=16, sliding_window=None),
    "mistral-window": llm_fields("mistral", sliding_window=4),
    "qwen2": llm_fields("qwen2", num_hidden_layers=4),
    "qwen3-wide-heads": llm_fields("qwen3", head_dim=16),
    "qwen3-1-kv-head": llm_fields("qwen3", num_key_value_heads=1),
}


def shape_of(fields):
    window = fields.get("sliding_window")
    windows = dict.fromkeys(range(fields["num_hidden_layers"]), window) if window else None
    return Shape(fields["num_attention_heads"], fields["head_dim"], windows=windows)


def float64_model(node, fields):
    """A model whose every parameter is away from its initial value. What transformers holds in
    float32 inside (norms and rotary tables) bounds the agreement."""
    model = fused_llm(node, {**fields, "rms_norm_eps": 1e-6}, TOKENS).double()
    perturb(model.parameters())
    return model


def reference_of(model, node, fields):
    kinds = {CONCAT: "concat", MODALITY_ADAPTIVE: "modality_adaptive", DEEPSTACK: "deepstack"}
    kind = kinds.get(node["_target_"]) or node.get("gate")
    if node["_target_"] == CROSS_ATTENTION:
        kind = f"cross-{node.get('place', 'before')}"
    layers, mi_rope = tuple(node.get("layers", ())), node.get("mi_rope", True)
    weights = dict(model.llm.named_parameters())
    bidirectional = node.get("attention") == "bidirectional"
    sees = node.get("sees", "all")
    return ReferenceLM(weights, shape_of(fields), kind, layers, mi_rope, bidirectional, sees)


def reference_rows(reference, batch, tokens, per_image):
    """Logits (T, V) of each row, without padding."""
    out = []
    for b, row in enumerate(ROWS):
        ids, is_visual, starts = expand(row, per_image)
        images = images_of(batch, b)
        levels = None
        if reference.fusion == "deepstack":
            levels = visual_tokens(batch, tokens).levels[:, images].unbind(1)
        out.append(reference.logits(ids, is_visual, [tokens[i] for i in images], starts, levels))
    return out


@each({**FUSIONS, **VARIANTS})
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.fast_cases(9)
def test_logits_and_gradients_are_those_of_the_loops(node, llm):
    fields = LLMS[llm]
    model = float64_model(node, fields)
    per_image = model.fusion.tokens_per_image
    tokens = torch.randn(5, TOKENS, 32, dtype=torch.float64, requires_grad=True)
    watched = {
        **fusion_parameters(model),
        **{
            name: parameter
            for name, parameter in model.llm.named_parameters()
            if name.startswith(
                (
                    "model.embed_tokens",
                    "model.norm",
                    "lm_head",
                    "model.layers.0.",
                    "model.layers.2.self_attn",
                )
            )
        },
    }
    assert node["_target_"] in (CONCAT, DEEPSTACK) or fusion_parameters(model)
    coefficients = torch.randn(len(ROWS), 20, 97, dtype=torch.float64)

    expected = reference_rows(
        reference_of(model, node, fields), make_batch(ROWS, per_image), tokens, per_image
    )
    loss = sum((coefficients[b, : len(rows)] * rows).sum() for b, rows in enumerate(expected))
    expected_gradients = torch.autograd.grad(loss, [tokens, *watched.values()])

    for left in (False, True):
        batch = make_batch(ROWS, per_image, left)
        logits = model(batch, visual_tokens(batch, tokens))
        got = [of_row(logits, batch, b) for b in range(len(ROWS))]
        for b, rows in enumerate(expected):
            torch.testing.assert_close(
                got[b], rows, rtol=1e-5, atol=1e-5, msg=lambda m, b=b: f"row {b}: {m}"
            )
        loss = sum((coefficients[b, : len(rows)] * rows).sum() for b, rows in enumerate(got))
        found = torch.autograd.grad(loss, [tokens, *watched.values()])
        for name, a, b in zip(["visual tokens", *watched], found, expected_gradients):
            scale = b.abs().max().item()
            torch.testing.assert_close(
                a, b, rtol=0, atol=2e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
