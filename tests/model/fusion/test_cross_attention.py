"""Cross-attention beside the LLM's own attention: where it stands, what it refuses, and that an LLM
begins unchanged."""

import dataclasses

import pytest
import torch

from families import fields_of
from helpers import (
    CROSS_ATTENTION,
    IMAGE,
    ROWS,
    VARIANTS,
    fused_llm,
    gradients,
    llm_fields,
    loss_of,
    make_batch,
    make_model,
    of_row,
    perturb,
    policy,
    visual_tokens,
)
from owlfuse.model.fusion.cross_attention import blocks_of
from owlfuse.model.llm import load_llm

TOKENS = 3
FAMILIES = {
    "nemotron": fields_of("nemotron"),
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 40,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    },
}


def node(**options):
    return {"_target_": CROSS_ATTENTION, "layers": [0, 2], **options}


@torch.no_grad()
@pytest.mark.parametrize("place", ["before", "after", "parallel"])
def test_with_closed_gates_pictures_change_nothing_and_open_ones_are_learned_first(place):
    model = make_model(node(place=place, mlp=True))
    batch = make_batch(ROWS)
    changed = dataclasses.replace(batch, pixel_values=-batch.pixel_values)
    assert torch.equal(model(batch), model(changed))
    with torch.enable_grad():
        found = gradients(model, loss_of(model(batch), batch))
    for name, gradient in found.items():
        if ".visual." in name:
            is_gate = name.endswith(("visual.gate", "visual.mlp_gate"))
            assert gradient.any() == is_gate, name


@torch.no_grad()
@pytest.mark.parametrize("place", ["before", "after", "parallel"])
# their layers hand no keyword arguments down, or have other names
@pytest.mark.parametrize("family", FAMILIES)
def test_it_works_on_layers_that_hand_nothing_down(family, place):
    fields = {"model_type": family, **FAMILIES[family]}
    llm = load_llm(97, config=fields)
    width = llm.config.hidden_size
    model = fused_llm(node(place=place, gate="none"), fields, TOKENS)
    batch = make_batch([[11, 12, IMAGE, 13, 14], [21, 22, 23]])
    tokens = torch.randn(1, TOKENS, width)
    logits = model(batch, visual_tokens(batch, tokens))
    changed = model(batch, visual_tokens(batch, -tokens))
    assert torch.equal(logits[0, :2], changed[0, :2])
    assert ((logits - changed)[0, 2:].abs().amax(-1) > 1e-5).all()
    plain = load_llm(97, config=fields).eval()
    weights = {n: w for n, w in model.llm.state_dict().items() if ".visual." not in n}
    plain.load_state_dict(weights)
    alone = plain(input_ids=torch.tensor([[21, 22, 23]])).logits[0]
    torch.testing.assert_close(of_row(logits, batch, 1), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        # what attention gives is normed before it is added
        (llm_fields("gemma3_text"), "after", "place: after: layer 0 of Gemma3ForCausalLM has no"),
        (llm_fields("olmo2"), "parallel", "layer 0 of Olmo2ForCausalLM has no norm before its"),
        # attention and MLP read the same
        (llm_fields("gpt_neox", use_parallel_residual=True), "after", "take before or parallel"),
        # what attention gives is scaled
        (llm_fields("granite", residual_multiplier=0.5), "after", "take before or parallel"),
    ],
)
def test_a_place_that_a_layer_has_not_is_refused(fields, place, message):
    if fields["model_type"] in ("gpt_neox",):
        fields = {k: v for k, v in fields.items() if k not in ("num_key_value_heads", "head_dim")}
    with pytest.raises(ValueError, match=message):
        fused_llm(node(place=place), fields, TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"place": "inside"}, "place is 'inside', expected one of before, after, parallel"),
        ({"gate": "sigmoid"}, "gate is 'sigmoid', expected one of tanh, none"),
        ({"heads": 0}, "heads: 0 is no number of heads"),
        ({"layers": [0, 3]}, "the LLM has 3 layers, 0 to 2"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fused_llm(node(**options), llm_fields(), TOKENS)


def test_its_heads_are_the_llms_or_so_many():
    block = blocks_of(fused_llm(node(), llm_fields(), TOKENS).llm)[0]
    assert block.q_proj.weight.shape == (4 * 8, 32)
    assert block.k_proj.weight.shape == (2 * 8, 32)
    # a number that does not divide the width of the copy that fusions are tried on
    wide = llm_fields(hidden_size=48)
    block = blocks_of(fused_llm(node(heads=3), wide, TOKENS).llm)[0]
    assert block.k_proj.weight.shape == block.q_proj.weight.shape == (48, 48)
    block = blocks_of(fused_llm(node(heads=2), llm_fields(), TOKENS).llm)[0]
    assert block.k_proj.weight.shape == block.q_proj.weight.shape == (32, 32)
    assert block.head_width == 16


def test_tensor_ranks_that_do_not_divide_its_heads_are_refused():
    model = fused_llm(node(heads=1), llm_fields(), TOKENS)
    model.check_split(1)
    with pytest.raises(ValueError, match="cross_attention has 1 heads, which 2 tensor ranks"):
        model.check_split(2)


def test_lora_reaches_its_projections_and_not_the_llms():
    adapter = {"fusion": policy("LoRA", r=2, targets=["q_proj", "v_proj"])}
    model = make_model(VARIANTS["cross_attention-before-mlp"], adapter=adapter)
    updated = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    blocks = [f"llm.model.layers.{layer}.visual" for layer in (0, 2)]
    assert updated == {f"{block}.{name}" for block in blocks for name in ("q_proj", "v_proj")}


@pytest.mark.parametrize("place", ["before", "after", "parallel"])
def test_a_forward_in_between_does_not_reach_what_is_computed_again(place):
    """One forward, then one of other pictures without gradients, then the first one's backward."""
    model = make_model(node(place=place, gate="none"), gradient_checkpointing=True).train()
    perturb(p for name, p in model.llm.named_parameters() if ".visual." in name)
    first, second = make_batch(ROWS), make_batch([[IMAGE, 11], [12, IMAGE, IMAGE]])
    expected = gradients(model, loss_of(model(first), first))
    loss = loss_of(model(first), first)
    with torch.no_grad():
        model(second)
    for name, gradient in gradients(model, loss).items():
        assert torch.equal(gradient, expected[name]), name
