"""What LoRA passes on to peft: each option trains, is saved, resumed, merged and exported."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from helpers import (
    FROZEN,
    ROWS,
    VOCAB,
    llm_fields,
    losses_of_steps,
    make_batch,
    model_node,
    perturb,
    policy,
)
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel, load_base, load_exported
from owlfuse.artifacts.weights import check_fits, frozen_hashes, load_weights, saved_names
from owlfuse.core.errors import DataError
from owlfuse.model.adapters import LoRA, Part
from owlfuse.model.llm import check_split
from owlfuse.model.multimodal import build_model, on_meta
from owlfuse.training.optim import AdamWCosine

OPTIONS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "alpha": 5.0},
    "patterns": {
        "rank_pattern": {"layers.1.mlp.down_proj": 3, "q_proj": 5},
        "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 7.0},
        "use_rslora": True,
    },
    "modules": {"modules_to_save": ["norm", "layers.0.input_layernorm", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian", "use_dora": True, "use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa", "dropout": 0.3},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2", "use_rslora": True, "alpha": 3.0},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 1}},
}


def build(options, fusion="concat", parts=("llm",)):
    """The same base for all options of a fusion: their random numbers come after its own."""
    torch.manual_seed(0)
    adapter = FROZEN | {part: policy("LoRA", **{"r": 2, **options}) for part in parts}
    return build_model(model_node(fusion, adapter=adapter), VOCAB)[0].eval()


def train(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return losses_of_steps(model, optimizer, steps)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_runs():
    """The options, of which one is fast and stands for the others."""
    for name in OPTIONS:
        marks = [] if name == "pissa" else [pytest.mark.slow]
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", whole_runs())
@pytest.mark.slow
def test_an_option_starts_from_the_base_trains_and_is_saved_merged_and_exported(name, tmp_path):
    options = OPTIONS[name]
    base = build({"targets": ["q_proj"]})
    batch = make_batch(ROWS, base.fusion.tokens_per_image)
    model = build(options)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), base(batch), rtol=1e-4, atol=1e-4)

    # training moves what it says and lowers the loss
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    first, *_, last = train(model)
    assert last < first
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == trained(model)
    expected = {key for key in before if ".lora_" in key and ".start." not in key}
    if name == "modules":
        expected |= {f"llm.model.{key}.weight" for key in ("norm", "layers.0.input_layernorm")}
        expected |= {"llm.lm_head.weight"}
    assert moved == expected

    # a checkpoint holds what was trained, and gives the model again bit for bit
    state = {key: model.state_dict()[key].clone() for key in saved_names(model)}
    frozen = frozen_hashes(model)
    assert frozen["llm"] == frozen_hashes(build(options))["llm"]
    assert set(state) >= moved
    assert not any("base_layer" in key or "embed_tokens" in key for key in state)
    again = build(options)
    check_fits(again, state, frozen)
    with torch.no_grad():
        load_weights(again, state)
        wanted = model(batch)
        assert torch.equal(again(batch), wanted)
        assert (wanted - base(batch)).abs().max() > 1e-3

    # the base that is written is the base that was loaded
    apart = export(TrainedModel(model, None, None), tmp_path / "apart")
    with torch.no_grad():
        loaded = load_exported(apart)[0].model
        torch.testing.assert_close(loaded(batch), wanted, rtol=1e-4, atol=1e-4)
        weights = {key.replace(".base_layer", ""): p for key, p in loaded.named_parameters()}
        for key, p in base.named_parameters():
            if ".lora_" not in key and key not in moved:
                assert torch.equal(weights[key.replace(".base_layer", "")], p), key
    merged = export(TrainedModel(model, None, None), tmp_path / "merged", merge=True)
    assert not (merged / "adapter").exists()
    with torch.no_grad():
        from_merged = load_exported(merged)[0].model(batch)
        # of the largest logit: a sum of two matrices is rounded, and small logits cancel out
        assert (from_merged - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        started = load_base(str(apart), model_node(), VOCAB).eval()
        torch.testing.assert_close(started(batch), wanted, rtol=1e-4, atol=1e-4)


def test_ranks_and_scales_are_those_of_the_patterns():
    model = build(OPTIONS["patterns"] | {"alpha": 6.0})
    layers = model.llm.model.layers
    layer = layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 5
    assert layer.scaling["default"] == pytest.approx(6 / math.sqrt(5))
    assert layers[1].mlp.down_proj.lora_B["default"].weight.shape[1] == 3
    assert layers[0].mlp.down_proj.lora_B["default"].weight.shape[1] == 2
    assert layers[2].mlp.up_proj.scaling["default"] == pytest.approx(7 / math.sqrt(2))


@torch.no_grad()
def test_dora_scales_each_row_to_the_length_that_is_trained():
    model = build({"use_dora": True, "use_rslora": True, "alpha": 3.0})
    layer = model.llm.model.layers[1].mlp.down_proj
    perturb([p for name, p in layer.named_parameters() if "lora_" in name])
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    moved = layer.base_layer.weight + 3.0 / math.sqrt(2) * low_rank
    lengths = layer.lora_magnitude_vector["default"].weight
    weight = lengths[:, None] * moved / moved.square().sum(1, keepdim=True).sqrt()
    states = torch.randn(4, 5, moved.shape[1])
    torch.testing.assert_close(layer(states), states @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_trains_as_pefts_own_whose_base_is_changed(init):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    ours, pefts = copy.deepcopy(plain), copy.deepcopy(plain)
    part = Part("connector", ours, dict(ours.named_parameters()))
    LoRA(r=2, alpha=6.0, init_lora_weights=init).apply(part)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init)
    inject_adapter_in_model(config, pefts)
    assert torch.equal(ours[0].base_layer.weight, plain[0].weight)
    assert not torch.equal(pefts[0].base_layer.weight, plain[0].weight)
    states, targets = torch.randn(7, 6), torch.randn(7, 4)
    torch.testing.assert_close(ours(states), plain(states), rtol=1e-4, atol=1e-5)
    for model in (ours, pefts):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (model(states) - targets).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(states), pefts(states), rtol=1e-4, atol=1e-5)
    assert (ours(states) - plain(states)).abs().max() > 1e-2


@torch.no_grad()
def test_updates_of_one_part_stay_when_another_part_gets_its_own():
    """peft leaves each layer with the updates that were added last anywhere in the LLM."""
    adapter = FROZEN | {
        "fusion": policy("LoRA", r=2, init_lora_weights="pissa"),
        "llm": policy("LoRA", r=2),
    }
    torch.manual_seed(0)
    plain = build_model(model_node("modality_adaptive"), VOCAB)[0].eval()
    torch.manual_seed(0)
    model = build_model(model_node("modality_adaptive", adapter=adapter), VOCAB)[0].eval()
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    expected = plain(batch)
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)
    for kind in (".vision.lora_B.default", "q_proj.lora_B.default", ".vision.lora_B.start"):
        before = model(batch)
        perturb([p for name, p in model.named_parameters() if kind in name], scale=0.5)
        assert (model(batch) - before).abs().max() > 1e-3, kind


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vision", "connector"])
@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_other_parts_take_them_too(part, name, tmp_path):
    options = {key: value for key, value in OPTIONS[name].items() if key != "dropout"}
    model = build(options, parts=(part,))
    train(model)
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    with torch.no_grad():
        expected = model(batch)
        torch.testing.assert_close(
            load_exported(out)[0].model(batch), expected, rtol=1e-4, atol=1e-4
        )
        merged = load_exported(out, merge=True)[0].model
        torch.testing.assert_close(merged(batch), expected, rtol=1e-4, atol=1e-4)


def test_parts_with_and_without_rslora_share_an_adapter_and_with_and_without_dora_do_not(tmp_path):
    adapter = FROZEN | {
        "connector": policy("LoRA", r=3, use_rslora=True, init_lora_weights="olora"),
        "llm": policy("LoRA", r=2, alpha=5.0),
    }
    model = build_model(model_node(adapter=adapter), VOCAB)[0].eval()
    perturb([p for p in model.parameters() if p.requires_grad])
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    with torch.no_grad():
        loaded = load_exported(out)[0].model
        torch.testing.assert_close(loaded(batch), model(batch), rtol=1e-4, atol=1e-4)

    adapter["connector"] = policy("LoRA", r=3, use_dora=True)
    model = build_model(model_node(adapter=adapter), VOCAB)[0].eval()
    with pytest.raises(
        DataError, match="connector.proj has an update with use_dora and .*merge=true"
    ):
        export(TrainedModel(model, None, None), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    export(TrainedModel(model, None, None), tmp_path / "merged", merge=True)


def test_a_tied_head_that_is_saved_is_the_table_and_new_rows_are_no_longer_apart():
    adapter = FROZEN | {"llm": policy("LoRA", r=2, modules_to_save=["lm_head"])}
    llm = llm_fields(tie_word_embeddings=True)
    model, summaries = build_model(
        model_node(llm=llm, adapter=adapter), VOCAB, new_tokens={"<new>": 96}
    )
    assert "llm.model.embed_tokens.weight" in trained(model)
    assert model.new_rows == {}
    low_rank = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    (llm_summary,) = [summary for summary in summaries if summary.part == "llm"]
    assert llm_summary.trained == low_rank + VOCAB * 32


def test_lengths_have_the_parts_rate_and_no_weight_decay():
    model = build({"use_dora": True})
    groups = AdamWCosine(lr=1e-3, part_lr={"llm": 3e-4}).groups(model)
    vectors = {id(p) for n, p in model.named_parameters() if "lora_magnitude_vector" in n}
    (group,) = [group for group in groups if vectors <= {id(p) for p in group["params"]}]
    assert group["lr"] == 3e-4
    assert group["weight_decay"] == 0


REFUSED = {
    "eva": ({"init_lora_weights": "eva"}, "eva needs a pass over the data"),
    "corda": ({"init_lora_weights": "corda"}, "corda needs a pass over the data"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq needs a quantizer"),
    "misspelled": ({"init_lora_weights": "pisa"}, "init_lora_weights is 'pisa', expected true"),
    "both": ({"init_lora_weights": "olora", "use_dora": True}, "use_dora would scale too"),
    "rank": ({"init_lora_weights": "pissa", "r": 17}, "takes 17 directions of .* which has 16"),
    "odd": ({"init_lora_weights": "orthogonal", "r": 3}, "has 3; give an even one"),
    "zero": ({"rank_pattern": {"q_proj": 0}}, "q_proj has rank 0"),
    "pattern": ({"rank_pattern": {"qproj": 4}}, "rank_pattern: qproj fits no layer of llm"),
    "target": ({"targets": ["q_proj"], "alpha_pattern": {"k_proj": 4}}, "those are q_proj"),
    "module": ({"modules_to_save": ["nrom"]}, "no module nrom .* norm"),
    "twice": ({"modules_to_save": ["mlp"]}, "layers.0.mlp.gate_proj has an update, too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line_before_a_weight_is_made(name):
    options, message = REFUSED[name]
    adapter = FROZEN | {"llm": policy("LoRA", **options)}
    with pytest.raises(ValueError, match=rf"^adapter\.llm: .*{message}") as error:
        on_meta(model_node(adapter=adapter), VOCAB)
    assert "\n" not in str(error.value)


def test_all_options_are_known_on_the_meta_device_and_dora_is_not_split():
    for options in OPTIONS.values():
        adapter = FROZEN | {"llm": policy("LoRA", **{"r": 2, **options})}
        model, _ = on_meta(model_node(adapter=adapter), VOCAB)
        assert trained(model) == trained(build(options))
        if options.get("use_dora"):
            with pytest.raises(ValueError, match="q_proj has use_dora, and tensor ranks"):
                check_split(model.llm, 2)
        else:
            check_split(model.llm, 2)
