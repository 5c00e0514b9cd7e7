"""What of a decoder layer has a visual copy."""

import pytest
import torch

from helpers import (
    IMAGE,
    MODALITY_ADAPTIVE,
    VARIANTS,
    llm_fields,
    make_batch,
    make_model,
    perturb,
    policy,
)

EXPERT = {
    "_target_": MODALITY_ADAPTIVE,
    "copies": ["query", "key", "value", "output", "mlp"],
}
"""CogVLM's visual expert, which shares the norms."""
MODALITY_ADAPTIVE_NODE = {"_target_": MODALITY_ADAPTIVE}


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([], "give at least one"),
        (["key", "key"], "each once"),
        (["key", "head"], r"\['head'\] are unknown; there are norms, key, value, query"),
    ],
)
def test_copies_that_cannot_be_are_refused(copies, message):
    with pytest.raises(ValueError, match=message):
        make_model({"_target_": MODALITY_ADAPTIVE, "copies": copies})


@pytest.mark.parametrize("family", ["olmo", "nanochat"])
def test_norms_without_weights_are_refused_as_the_only_copies(family):
    with pytest.raises(ValueError, match="copies: the norms of .* have no weights"):
        make_model({"_target_": MODALITY_ADAPTIVE, "copies": ["norms"]}, llm=llm_fields(family))
    make_model(MODALITY_ADAPTIVE_NODE, llm=llm_fields(family))


def test_the_mlp_of_a_mixture_of_experts_is_refused():
    experts = llm_fields("qwen3_moe", num_experts=4, num_experts_per_tok=2)
    experts["moe_intermediate_size"] = 16
    with pytest.raises(ValueError, match=r"copies: mlp.*Qwen3MoeForCausalLM.*leave mlp out"):
        make_model(VARIANTS["modality_adaptive-all"], llm=experts)


@torch.no_grad()
def test_with_copies_of_all_a_token_passes_none_of_the_other_modalitys_weights():
    model = make_model(VARIANTS["modality_adaptive-all"])
    batch = make_batch([[IMAGE, 11, 12]], model.fusion.tokens_per_image).with_places()
    last = model.fusion.tokens_per_image - 1
    before = model(batch)
    perturb(p for name, p in model.llm.named_parameters() if ".text." in name)
    after = model(batch)
    # an image that stands first sees no text
    assert torch.equal(after[0, :last], before[0, :last])
    assert (after[0, last + 1 :] - before[0, last + 1 :]).abs().max() > 1e-3


def test_the_experts_parameters_are_the_fusions_and_lora_reaches_them():
    model = make_model(EXPERT, adapter={"fusion": policy("LoRA", r=2), "llm": policy("Frozen")})
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "llm" in name}
    assert len(trained) == 3 * 7 * 2
    assert all(".vision." in name for name in trained)
