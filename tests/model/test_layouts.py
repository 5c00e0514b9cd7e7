"""Where LLMs keep their modules; what of an LLM is missing is told in one line."""

import logging

import pytest
import torch

from families import small_fields
from helpers import VOCAB, fused_llm
from owlfuse.model.layouts import (
    decoder_layers,
    key_value_weights,
    projection_of,
    split_fused,
)
from owlfuse.model.llm import load_llm, logged_classes

CONCAT = {"_target_": "owlfuse.model.fusion.concat.Concat"}
HYPERATTENTION = {
    "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
    "layers": [0, 1, 2, 3],
}
FUSED = {
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_bigcode": {"multi_query": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""One weight for queries, keys and values: in blocks, in transposed blocks, by head, with one key
head, and by group."""


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_an_llm_whose_fused_projection_is_split_computes_the_same(family):
    llm = load_llm(VOCAB, config={**small_fields(family), **FUSED[family]}).eval()
    ids = torch.arange(10, 20)[None]
    expected = llm(input_ids=ids).logits
    before = [key_value_weights(llm, layer) for layer in decoder_layers(llm)]
    for layer in decoder_layers(llm):
        split_fused(llm, layer)
    torch.testing.assert_close(llm(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    for layer, weights in zip(decoder_layers(llm), before, strict=True):
        assert torch.equal(projection_of(llm, layer, "key").module.weight, weights.key)
        assert torch.equal(projection_of(llm, layer, "value").module.weight, weights.value)


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_rows_of_a_fused_projection_are_those_of_its_keys_and_values(family):
    """With no values an attention gives its output projection's bias, whatever it reads."""
    llm = load_llm(VOCAB, config={**small_fields(family), **FUSED[family]}).eval()
    layer = decoder_layers(llm)[0]
    split_fused(llm, layer)
    value = projection_of(llm, layer, "value").module
    value.weight.zero_()
    if value.bias is not None:
        value.bias.zero_()
    output = projection_of(llm, layer, "output").module
    inputs = []
    output.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    llm(input_ids=torch.arange(10, 20)[None])
    assert inputs[0].abs().max() == 0


@pytest.mark.parametrize(
    ("family", "fusion", "message"),
    [
        ("mamba", HYPERATTENTION, r"MambaForCausalLM has no attention in decoder layer 0"),
        ("deepseek_v3", HYPERATTENTION, r"DeepseekV3ForCausalLM has no key projection at"),
        ("rwkv", CONCAT, r"RwkvForCausalLM takes no key-value cache"),
    ],
)
def test_what_an_llm_lacks_is_named_in_one_line(family, fusion, message):
    with pytest.raises(ValueError, match=message) as refusal, torch.device("meta"):
        fused_llm(fusion, small_fields(family), 3)
    assert "\n" not in str(refusal.value)


def test_an_llm_without_the_attention_that_is_asked_for_says_what_it_takes(caplog):
    logged_classes.clear()
    with caplog.at_level(logging.WARNING):
        llm = load_llm(VOCAB, config=small_fields("gemma2"))
        load_llm(VOCAB, config=small_fields("llama"))
    assert llm.config._attn_implementation == "eager"
    messages = [record.message for record in caplog.records if "attention:" in record.message]
    assert messages == ["attention: Gemma2ForCausalLM has none for sdpa, and computes it by eager"]


@pytest.mark.parametrize("family", ["ministral", "hunyuan_v1_dense"])
def test_a_head_width_that_a_configuration_leaves_out_is_the_usual_one(family):
    fields = small_fields(family)
    fields.pop("head_dim")
    llm = load_llm(VOCAB, config=fields)
    assert decoder_layers(llm)[0].self_attn.head_dim == 64 // 4


@torch.no_grad()
def test_a_family_that_is_in_no_table_has_its_one_list_of_layers_found():
    llm = load_llm(VOCAB, config=small_fields("llama"))
    llm.model.blocks = llm.model.layers
    del llm.model.layers
    assert decoder_layers(llm) is llm.model.blocks


def test_embeddings_of_another_width_than_hidden_states_are_refused():
    fields = {**small_fields("opt"), "word_embed_proj_dim": 32}
    with pytest.raises(ValueError, match="embeddings of width 32 and hidden states of width 64"):
        load_llm(VOCAB, config=fields)
