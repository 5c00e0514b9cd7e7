"""Mixtures of experts: the router's balancing loss, and what LoRA reaches of fused experts."""

import logging

import pytest
import torch

from families import LOCAL_EXPERTS, small_fields
from helpers import VOCAB, make_batch, model_node, policy
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel, load_base, load_exported
from owlfuse.model.llm import balancing_coefficient, balancing_loss, load_llm
from owlfuse.model.multimodal import build_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
family = pytest.mark.parametrize("name", FAMILIES)


def fields_of(name, coefficient=0.1):
    return {"model_type": name, **SMALL, **FAMILIES[name], "router_aux_loss_coef": coefficient}


def model_of(name, adapter=None, coefficient=0.1):
    node = model_node(
        "concat", llm=fields_of(name, coefficient), adapter={"llm": adapter} if adapter else None
    )
    return build_model(node, VOCAB)[0]


@family
def test_the_balancing_loss_is_transformers_own_with_padding_left_out(name):
    model = model_of(name).train()
    batch = make_batch([[11, 12, 13, 14, 15, 16], [21, 22, 23]], model.fusion.tokens_per_image)
    model(batch)
    own = model.llm(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        output_router_logits=True,
    )
    assert balancing_coefficient(model.llm) == pytest.approx(0.1)
    torch.testing.assert_close(model.balancing_loss, own.aux_loss, rtol=1e-4, atol=1e-4)
    model.balancing_loss.backward()
    routers = {
        n: p
        for n, p in model.llm.named_parameters()
        if "gate" in n and p.ndim == 2 and p.shape[0] == 4
    }
    routers = routers or {n: p for n, p in model.llm.named_parameters() if "router" in n}
    assert routers
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in routers.values())


def test_experts_that_are_pairs_of_keys_have_doges_own_balancing_loss():
    experts = {"is_moe": True, "num_experts": 9, "num_experts_per_tok": 2}
    llm = load_llm(VOCAB, config={"model_type": "doge", **SMALL, **experts}).train()
    ids = torch.tensor([[11, 12, 13, 14]])
    mask = torch.ones_like(ids)
    own = llm(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    loss = balancing_loss(llm, own.router_logits, mask)
    torch.testing.assert_close(loss, own.aux_loss)
    assert balancing_coefficient(llm) > 0


@family
def test_in_evaluation_for_a_frozen_llm_or_without_a_coefficient_there_is_none(name):
    for model in (
        model_of(name).eval(),
        model_of(name, policy("Frozen")).train(),
        model_of(name, coefficient=0.0).train(),
    ):
        model(make_batch([[11, 12, 13]], model.fusion.tokens_per_image))
        assert model.balancing_loss is None


def test_rows_of_new_tokens_do_not_make_a_frozen_llm_a_trained_one():
    node = model_node("concat", llm=fields_of("qwen3_moe"), adapter={"llm": policy("Frozen")})
    model = build_model(node, VOCAB, new_tokens={"<new>": VOCAB - 1})[0].train()
    assert model.new_rows
    model(make_batch([[11, 12, 13]], model.fusion.tokens_per_image))
    assert model.balancing_loss is None


def test_a_dense_llm_has_none():
    assert balancing_coefficient(load_llm(VOCAB, config={"model_type": "llama", **SMALL})) == 0
    dense = load_llm(VOCAB, config={"model_type": "doge", **SMALL})
    assert balancing_coefficient(dense) == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_all_linear_says_which_experts_it_does_not_reach_and_how_much_they_are(name, caplog):
    with caplog.at_level(logging.WARNING):
        model = model_of(name, policy("LoRA", r=2))
    (record,) = [record for record in caplog.records if "all-linear" in record.message]
    experts = sum(
        p.numel() for n, p in model.llm.named_parameters() if ".experts." in n and ".lora_" not in n
    )
    total = sum(p.numel() for n, p in model.llm.named_parameters() if ".lora_" not in n)
    assert f"{100 * experts / total:.0f} %" in record.message
    assert "experts.gate_up_proj" in record.message
    caplog.clear()
    model_of(
        name, policy("LoRA", r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    assert not [record for record in caplog.records if "all-linear" in record.message]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
@pytest.mark.fast_cases(2)
def test_lora_of_fused_experts_is_trained_and_exported(name, merge, tmp_path):
    model = model_of(
        name, policy("LoRA", r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    ).eval()
    updates = {n: p for n, p in model.llm.named_parameters() if ".lora_" in n}
    assert any("experts" in n for n in updates)
    batch = make_batch([[11, "image", 12, 13]], model.fusion.tokens_per_image)
    with torch.no_grad():
        before = model(batch)
        for parameter in updates.values():
            parameter.normal_(std=0.3)
        expected = model(batch)
    assert (expected - before).abs().max() > 1e-2
    model(batch).square().sum().backward()
    assert all(p.grad is not None for n, p in updates.items())
    assert all(p.grad is None for n, p in model.llm.named_parameters() if ".lora_" not in n)
    tokenizer = None
    model.released = None
    out = export(TrainedModel(model, tokenizer, None), tmp_path / "out", merge=merge)
    with torch.no_grad():
        torch.testing.assert_close(
            load_exported(out)[0].model(batch), expected, rtol=1e-4, atol=1e-4
        )


def test_a_parameter_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"has no matrix experts\.w1; .* experts\.down_proj, experts\.gate_up_proj"
    ):
        model_of("mixtral", policy("LoRA", r=2, target_parameters=["experts.w1"]))


BALANCED = {
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "afmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
"""Families whose routers have biases that no gradient reaches."""


def balanced(name):
    more = {"moe_intermediate_size": 24, "num_hidden_layers": 3}
    return {"model_type": name, **SMALL, **BALANCED[name], **more}


def router_biases(llm):
    """The biases by name."""
    return {
        name: parameter
        for name, parameter in llm.named_parameters()
        if ("bias" in name and "expert" in name) or "e_score" in name
    }


@pytest.mark.parametrize("adapter", [policy("Full"), policy("LastN", n=2)], ids=["full", "last_n"])
@pytest.mark.parametrize("source", ["random", "pretrained", "export"])
@pytest.mark.parametrize("name", BALANCED)
@pytest.mark.fast_cases(4)
def test_biases_that_balance_a_router_without_gradients_are_not_among_what_is_trained(
    name, source, adapter, tmp_path
):
    node = model_node("concat", llm=balanced(name), adapter={"llm": adapter})
    base = None
    if source == "pretrained":
        load_llm(VOCAB, config=balanced(name)).save_pretrained(tmp_path / "llm")
        node = model_node("concat", pretrained=str(tmp_path / "llm"), adapter={"llm": adapter})
    elif source == "export":
        model = build_model(node, VOCAB)[0]
        export(TrainedModel(model, None, None), tmp_path / "out")
        base = load_base(str(tmp_path / "out"), node, VOCAB)
    model = build_model(node, VOCAB, base)[0].train()
    rows = [[11 + (i * 7 + j) % 80 for j in range(20)] for i in range(8)]
    model(make_batch(rows, model.fusion.tokens_per_image)).float().square().sum().backward()
    biases = router_biases(model.llm)
    assert biases
    assert not any(bias.requires_grad for bias in biases.values())
    assert [n for n, p in model.llm.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("fusion", ["hyperattention-adaptive", "modality_adaptive"])
def test_what_a_fusion_adds_to_a_frozen_llm_gets_no_balancing_loss(fusion):
    fields = {**fields_of("qwen3_moe"), "num_hidden_layers": 3}
    node = model_node(fusion, llm=fields, adapter={"llm": policy("Frozen")})
    model = build_model(node, VOCAB)[0].train()
    assert any(parameter.requires_grad for parameter in model.llm.parameters())
    model(make_batch([[11, 12, 13]], model.fusion.tokens_per_image))
    assert model.balancing_loss is None


@pytest.mark.parametrize(
    ("name", "fields", "coefficient"),
    [
        ("jetmoe", {**LOCAL_EXPERTS, "aux_loss_coef": 0.3}, 0.3),
        (
            "dbrx",
            {"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.4}},
            0.4,
        ),
        # how these say that there are no experts
        ("granitemoehybrid", {"num_local_experts": 0}, 0),
        ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}, 0),
    ],
)
def test_the_coefficient_is_that_of_the_family_s_own_forward(name, fields, coefficient):
    fields = {**small_fields(name), **fields}
    model = build_model(model_node("concat", llm=fields), VOCAB)[0].train()
    assert balancing_coefficient(model.llm) == pytest.approx(coefficient)
    model(make_batch([[11, 12, 13]], model.fusion.tokens_per_image))
    assert (model.balancing_loss is not None) == (coefficient > 0)
