"""Loading a causal LM, and what `llm` says of its parts."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import small_fields
from helpers import FROZEN, ROWS, VOCAB, llm_fields, make_batch, make_model, policy
from owlfuse.model.fusion.modality_adaptive import ModalityAdaptive
from owlfuse.model.layouts import decoder_layers
from owlfuse.model.llm import (
    cache_argument,
    check_architecture,
    check_length,
    check_split,
    load_llm,
    make_config,
    recompute_activations,
    rotary,
    rotate,
    width,
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(3)
    load_llm(VOCAB, config=llm_fields("qwen2")).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_configuration_gives_a_random_model_of_its_type_and_size(model_type):
    llm = load_llm(VOCAB, config=llm_fields(model_type))
    assert llm.config.model_type == model_type
    assert llm.get_input_embeddings().weight.shape == (VOCAB, 32)
    assert len(decoder_layers(llm)) == 3
    assert width(llm) == 32
    assert decoder_layers(llm)[0].self_attn.k_proj.out_features == 2 * 8
    assert cache_argument(llm) in ("cache", "past_key_values")


def test_a_folder_gives_its_weights_and_not_random_ones(folder):
    llm = load_llm(VOCAB, pretrained=folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert llm.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in llm.state_dict().items())


def test_embeddings_grow_to_the_tokenizers_size_and_keep_what_they_were(folder):
    llm = load_llm(VOCAB + 5, pretrained=folder)
    before = load_llm(VOCAB, pretrained=folder)
    assert (
        llm.get_input_embeddings().weight.shape[0]
        == llm.get_output_embeddings().weight.shape[0]
        == VOCAB + 5
    )
    assert torch.equal(
        llm.get_input_embeddings().weight[:VOCAB], before.get_input_embeddings().weight
    )
    assert load_llm(VOCAB - 5, pretrained=folder).get_input_embeddings().weight.shape[0] == VOCAB


def test_on_the_meta_device_a_folder_is_read_for_its_configuration_alone(folder):
    with torch.device("meta"):
        llm = load_llm(VOCAB + 5, pretrained=folder)
    assert all(parameter.is_meta for parameter in llm.parameters())
    assert llm.get_input_embeddings().weight.shape[0] == VOCAB + 5
    real = load_llm(VOCAB + 5, pretrained=folder)
    assert {n: p.shape for n, p in llm.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_dtype_is_float32_unless_asked_otherwise(dtype, expected, folder):
    assert load_llm(VOCAB, pretrained=folder, dtype=dtype).dtype == expected
    assert load_llm(VOCAB, config=llm_fields(), dtype=dtype).dtype == expected


def test_what_transformers_keeps_in_32_bits_beside_float16_stays_so():
    model = make_model("concat", llm=small_fields("deepseek_v32"))
    dtypes = {}
    for dtype in (torch.float16, torch.bfloat16):
        copied = copy.deepcopy(model).to(dtype)
        for name, parameter in copied.llm.named_parameters():
            if "indexer.weights_proj" in name:
                dtypes[dtype] = parameter.dtype
    assert dtypes == {torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_rotary_and_rotate_turn_pairs_by_position(model_type):
    llm = load_llm(VOCAB, config=llm_fields(model_type))
    positions = torch.tensor([[0, 1, 5, 2], [3, 3, 0, 9]])
    states = torch.randn(2, 2, 4, 8)
    cos, sin = rotary(llm, states, positions)
    got = rotate(decoder_layers(llm)[0].self_attn, states, cos, sin)
    for b in range(2):
        for t in range(4):
            for j in range(4):
                angle = positions[b, t].item() / 10000 ** (2 * j / 8)
                x, y = states[b, :, t, j], states[b, :, t, j + 4]
                torch.testing.assert_close(
                    got[b, :, t, j], x * math.cos(angle) - y * math.sin(angle), rtol=1e-4, atol=1e-5
                )
                torch.testing.assert_close(
                    got[b, :, t, j + 4],
                    y * math.cos(angle) + x * math.sin(angle),
                    rtol=1e-4,
                    atol=1e-5,
                )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of pretrained .* and config"),
        ({"pretrained": "x", "config": {"model_type": "llama"}}, "one of pretrained .* and config"),
        ({"config": {"hidden_size": 32}}, "no model_type"),
        ({"config": {"model_type": "lama"}}, "lama"),
        ({"config": llm_fields(hiden_size=32)}, "hiden_size"),
        (
            {"config": {"model_type": "xlm", "emb_dim": 32, "n_heads": 4, "n_layers": 2}},
            "XLMWithLMHeadModel",
        ),
        ({"pretrained": "/no/such/folder"}, "/no/such/folder is no folder"),
        ({"pretrained": "./nowhere"}, "./nowhere is no folder"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_cannot_be_loaded_is_an_error_that_names_it(arguments, message, device):
    with pytest.raises(ValueError, match=message), torch.device(device):
        load_llm(VOCAB, **arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_folder_without_a_configuration_is_an_error_that_names_it(tmp_path, device):
    with pytest.raises(ValueError, match=str(tmp_path)), torch.device(device):
        load_llm(VOCAB, pretrained=str(tmp_path))


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        load_llm(VOCAB, pretrained=str(tmp_path / "weights"))


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": 5, "head_dim": None}, {"num_key_value_heads": 3}]
)
def test_heads_that_do_not_fit_are_a_value_error(fields):
    with pytest.raises(ValueError, match=r"^config: .*heads"), torch.device("meta"):
        load_llm(VOCAB, config={k: v for k, v in llm_fields(**fields).items() if v is not None})


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_is_as_asked(on):
    assert (
        load_llm(VOCAB, config=llm_fields(), gradient_checkpointing=on).is_gradient_checkpointing
        == on
    )


def test_on_the_meta_device_a_given_architecture_stands_for_the_hub_s_and_is_not_used_for_weights():
    architecture = llm_fields(num_hidden_layers=2)
    with torch.device("meta"):
        planned = load_llm(VOCAB, pretrained="./not-there", architecture=architecture)
    assert len(planned.model.layers) == 2
    with pytest.raises(ValueError, match="pretrained: ./not-there is no folder"):
        load_llm(VOCAB, pretrained="./not-there", architecture=architecture)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "self_attn.q_norm.weight"),
        ("glm", {}, "mlp.down_proj"),
        ("diffllama", {}, "self_attn.lambda_q1"),
        ("apertus", {}, "mlp.act_fn.alpha_p"),
        ("stablelm", {}, "counts all heads"),
        ("hunyuan_v1_dense", {}, None),
        ("qwen3", {}, None),
        ("llama", {}, None),
    ],
)
def test_tensor_ranks_share_out_only_layers_whose_every_weight_they_split(
    model_type, fields, message
):
    llm = load_llm(VOCAB, config=llm_fields(model_type, **fields))
    check_split(llm, 1)
    if message is None:
        check_split(llm, 2)
        return
    with pytest.raises(ValueError, match=message):
        check_split(llm, 2)


def test_tensor_ranks_refuse_copies_of_an_mlp_that_they_cannot_share_out():
    llm = load_llm(VOCAB, config=llm_fields("glm"))
    ModalityAdaptive(4, ["mlp"]).attach(llm)
    with pytest.raises(ValueError, match="cannot share out mlp.gate_up_proj"):
        check_split(llm, 2)


def test_a_key_of_an_inner_configuration_that_it_does_not_know_is_refused():
    fields = {"model_type": "gemma3", "text_config": {"num_hidden_layer": 2}}
    with pytest.raises(ValueError, match=r"text_config.num_hidden_layer unknown to Gemma3TextConf"):
        make_config(fields, VOCAB)


def test_tensor_ranks_refuse_a_size_for_each_layer_as_gemma_3n_has_it():
    llm = load_llm(VOCAB, config=llm_fields("llama"))
    vars(llm.config)["intermediate_size"] = [40, 40]
    with pytest.raises(ValueError, match="differ in intermediate_size or have none"):
        check_split(llm, 2)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "gptj", "mpt"])
def test_rows_without_a_position_are_refused(family):
    llm = load_llm(VOCAB, config=small_fields(family))
    config = llm.config
    limit = config.max_seq_len if family == "mpt" else config.max_position_embeddings
    check_length(llm, limit)
    message = rf"has a table of {limit} positions; set data.max_length={limit}"
    with pytest.raises(ValueError, match=message):
        check_length(llm, limit + 1)


@pytest.mark.parametrize("family", ["bloom", "llama", "xglm"])
def test_rows_that_are_longer_than_an_llm_was_made_for_are_told(family, caplog):
    llm = load_llm(VOCAB, config=small_fields(family))
    limit = getattr(llm.config, "max_position_embeddings", None)
    check_length(llm, 2 * (limit or 4096))
    assert ("was not trained for" in caplog.text) == (limit is not None)


def test_an_adapter_beside_the_weights_is_refused(folder):
    """transformers would apply it, or load the model that it names, without a word."""
    (Path(folder) / "adapter_config.json").write_text('{"base_model_name_or_path": "another/one"}')
    with pytest.raises(ValueError, match=r"adapter_config.json is beside its weights"):
        load_llm(VOCAB, pretrained=folder)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def widened(file):
    config = json.loads((file.parent / "config.json").read_text())
    config["hidden_size"] *= 2
    (file.parent / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut, widened])
def test_weights_that_cannot_be_read_are_told_in_a_line(folder, damage):
    damage(Path(folder) / "model.safetensors")
    with pytest.raises(ValueError, match="^pretrained: ") as error:
        load_llm(VOCAB, pretrained=folder)
    assert "\n" not in str(error.value)


RATES = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    # whose layers drop in their own forward
    "opt": {"dropout": 0.5},
}


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_llm_drops_nothing_in_training(frozen, checkpointing, family):
    fields = {**small_fields(family), **RATES[family]}
    options = {"adapter": FROZEN | {"connector": policy("Full")}} if frozen else {}
    model = make_model("concat", llm=fields, **options)
    if checkpointing:
        recompute_activations(model.llm)
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch)) == frozen
    # else checkpointing would keep all activations
    if checkpointing:
        assert all(layer.training for layer in decoder_layers(model.llm))


def test_a_plan_is_of_the_folder_that_is_there_and_not_of_another_architecture(folder):
    other = llm_fields("qwen2", hidden_size=64)
    with torch.device("meta"):
        assert width(load_llm(VOCAB, pretrained=folder, architecture=other)) == 32
        # one that is not at hand
        assert width(load_llm(VOCAB, pretrained="some/where", architecture=other)) == 64
    llm = load_llm(VOCAB + 3, pretrained=folder)
    check_architecture(llm, {**llm_fields("qwen2"), "vocab_size": VOCAB})
    check_architecture(llm, None)
    for wrong in ({"hidden_size": 64}, {"vocab_size": VOCAB + 3}, {"model_type": "llama"}):
        with pytest.raises(ValueError, match=f"architecture: {next(iter(wrong))} is"):
            check_architecture(llm, wrong)
