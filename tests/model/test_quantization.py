"""An LLM in 4 bits: what is counted, planned, refused, trained, saved and exported."""

import math

import pytest
import torch
from transformers import BitsAndBytesConfig

from families import small_fields
from helpers import (
    FROZEN,
    ROWS,
    VOCAB,
    llm_fields,
    losses_of_steps,
    make_batch,
    model_node,
    policy,
)
from owlfuse.artifacts.export import export
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.load import TrainedModel, load_base, load_exported
from owlfuse.artifacts.weights import check_fits, frozen_hashes, load_weights, saved_names
from owlfuse.core.errors import DataError
from owlfuse.core.packages import MissingPackage
from owlfuse.model import quantization
from owlfuse.model.llm import check_split, load_llm
from owlfuse.model.multimodal import build_model, on_meta
from owlfuse.planning.step import bytes_of, measure_batch, meta_batch

EXACT = {"compute_dtype": "float32"}
QLORA = FROZEN | {"llm": policy("LoRA", r=2)}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of whole blocks."""
NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip
"""The values of NF4 (arXiv 2305.14314, appendix E)."""


def node(fusion="concat", adapter=QLORA, options=EXACT, **llm):
    fields = llm_fields(**WIDTHS | llm)
    return model_node(fusion, adapter=adapter, llm=fields, quantization=options)


def build(*args, **kwargs):
    torch.manual_seed(0)
    return build_model(node(*args, **kwargs), VOCAB)[0].eval()


def train(model, steps=3):
    # whose steps do not vanish beside a weight, as those of SGD for LoRA's first matrix do
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    return losses_of_steps(model, optimizer, steps)


# Without bitsandbytes: on the meta device


def test_the_plan_counts_half_a_byte_and_the_scales_and_the_table_the_numbers():
    plain, plain_summary = on_meta(model_node(adapter=QLORA, llm=llm_fields(**WIDTHS)), VOCAB)
    linear = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    for double, expected in ((False, linear * (0.5 + 4 / 64)), (True, linear * (0.5 + 1 / 64))):
        model, summary = on_meta(node(options={"use_double_quant": double}), VOCAB)
        assert summary == plain_summary
        of_linear = quantization.planned_bytes(model) - bytes_of(plain.parameters()) + 4 * linear
        # a float32 scale for 256 scales of each of the 21 layers
        assert of_linear == expected + (21 * 4 if double else 0)


def test_the_plan_keeps_no_dequantized_weight_for_the_backward_pass():
    llm = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    peaks = []
    for options in (None, {"compute_dtype": "bfloat16"}):
        model = on_meta(node(options=options, **llm), VOCAB)[0].train()
        batch = meta_batch(model, rows=1, length=8, images=0)
        peaks.append(measure_batch(model, batch, torch.bfloat16).peak())
    linear = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    plain, quantized = peaks
    # autocast's copies are kept by the plain model, and two of a layer at most are alive here
    assert plain > 1.5 * linear
    assert quantized < 2 * linear / 3


@pytest.mark.parametrize("name", ["Full", "LastN"])
def test_weights_in_4_bits_are_not_trained(name):
    adapter = FROZEN | {"llm": policy(name, **({"n": 1} if name == "LastN" else {}))}
    with pytest.raises(ValueError, match=r"adapter.llm: .* in 4 bits .*; give lora or frozen"):
        on_meta(node(adapter=adapter), VOCAB)
    saved = FROZEN | {"llm": policy("LoRA", targets=["q_proj"], modules_to_save=["down_proj"])}
    with pytest.raises(ValueError, match="down_proj.weight is held in 4 bits"):
        on_meta(node(adapter=saved), VOCAB)
    start = FROZEN | {"llm": policy("LoRA", init_lora_weights="pissa")}
    with pytest.raises(ValueError, match="decomposes weights, and these are in 4 bits"):
        on_meta(node(adapter=start), VOCAB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "quant_type is 'int4', expected one of nf4, fp4"),
        ({"load_in_4bit": True}, "no such key load_in_4bit; the keys are quant_type"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8'"),
    ],
)
def test_a_wrong_key_or_value_is_told_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=rf"llm: quantization: .*{message}"):
        on_meta(node(options=options), VOCAB)


def test_it_is_not_split_over_ranks_and_needs_its_package(monkeypatch):
    model, _ = on_meta(node(), VOCAB)
    with pytest.raises(ValueError, match=r"not split over ranks .* trainer=ddp"):
        check_split(model.llm, 2)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingPackage, match=r"model.llm.quantization .*owlfuse\[qlora\]"):
        model.check_training(sharded=False)


def test_matrices_that_are_no_linear_layers_are_told(caplog):
    with torch.device("meta"):
        gpt2 = load_llm(VOCAB, config=small_fields("gpt2"))
        with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layer that could be"):
            quantization.quantize(gpt2, quantization.Quantization())
        fields = small_fields("qwen3_moe") | {"intermediate_size": 128}
        experts = load_llm(VOCAB, config=fields)
        quantization.quantize(experts, quantization.Quantization())
        llama = load_llm(VOCAB, config=llm_fields(**WIDTHS))
        quantization.quantize(llama, quantization.Quantization())
    [line] = [record.message for record in caplog.records if "no linear layers" in record.message]
    assert "stacked experts" in line


@pytest.mark.parametrize("width", [32, 96])
def test_rows_that_are_no_whole_blocks_are_refused(width):
    message = rf"llm: quantization: .*down_proj has rows of {width} numbers"
    with pytest.raises(ValueError, match=message):
        on_meta(node(intermediate_size=width), VOCAB)


def test_weights_that_are_quantized_in_their_folder_are_refused(tmp_path):
    llm = load_llm(VOCAB, config=llm_fields(**WIDTHS))
    llm.config.quantization_config = {"quant_method": "awq", "bits": 4}
    llm.config.save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match=r"quantized already \(awq\)"):
        load_llm(VOCAB, pretrained=str(tmp_path))


# With it

needs_package = pytest.mark.skipif(
    not quantization.is_bitsandbytes_available(),
    reason="weights in 4 bits need pip install bitsandbytes (the extras qlora and dev have it)",
)


def nearest_nf4(weight):
    """What NF4 makes of a weight, block by block, without double quantization."""
    table = torch.tensor(NF4)
    blocks = []
    for block in weight.flatten().split(64):
        scale = block.abs().max()
        distances = (block[:, None] / scale - table).abs()
        blocks.append(table[distances.argmin(1)] * scale)
    return torch.cat(blocks).view_as(weight)


@needs_package
@torch.no_grad()
def test_layers_compute_with_the_nearest_of_16_values_of_their_block():
    torch.manual_seed(0)
    plain = build_model(model_node(llm=llm_fields(**WIDTHS)), VOCAB)[0].eval()
    model = build(options=EXACT | {"use_double_quant": False})
    for name, parameter in plain.llm.named_parameters():
        if "proj" in name:
            parameter.copy_(nearest_nf4(parameter))
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    torch.testing.assert_close(model(batch), plain(batch), rtol=1e-4, atol=1e-4)
    assert isinstance(model.llm.lm_head, torch.nn.Linear)
    assert model.llm.lm_head.weight.dtype == torch.float32


@needs_package
@pytest.mark.parametrize("fusion", ["concat", "modality_adaptive", "hyperattention-adaptive"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.fast_cases(2)
def test_three_steps_lower_the_loss_and_leave_the_4_bits_as_they_are(fusion, double):
    adapter = QLORA | {"fusion": policy("Full"), "connector": policy("Full")}
    options = {"use_double_quant": double, "quant_type": "nf4" if double else "fp4"}
    model = build(fusion, adapter, options, attention_bias=True).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, *_, last = train(model)
    assert last < first
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == trained
    layers = quantization.quantized_layers(model.llm)
    assert len(layers) == 21
    assert not any(".visual." in name or ".vision" in name for name in layers)
    planned = on_meta(node(fusion, adapter, options, attention_bias=True), VOCAB)[0]
    for name, layer in quantization.quantized_layers(planned.llm).items():
        state = layers[name].weight.quant_state
        scales = [state.absmax, *([state.state2.absmax] if double else [])]
        real = bytes_of([layers[name].weight.data, *scales])
        assert real == layer.quantization.weight_bytes(math.prod(layer.weight.shape))
    assert quantization.count_parameters(model) == sum(p.numel() for p in planned.parameters())


@needs_package
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora"]
)
@pytest.mark.fast_cases(1)
def test_it_is_saved_without_its_base_and_exported_as_plain_numbers(options, tmp_path):
    adapter = QLORA | {"llm": policy("LoRA", r=2, **options)}
    model = build(adapter=adapter, attention_bias=True)
    train(model)
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    state = {key: model.state_dict()[key].clone() for key in saved_names(model)}
    assert all(".lora_" in key for key in state)
    again = build(adapter=adapter, attention_bias=True)
    check_fits(again, state, frozen_hashes(model))
    with torch.no_grad():
        expected = model(batch)
        load_weights(again, state)
        assert torch.equal(again(batch), expected)
    other = build(adapter=adapter, attention_bias=True, options=EXACT | {"quant_type": "fp4"})
    with pytest.raises(DataError, match="frozen weights of llm are not those"):
        check_fits(other, state, frozen_hashes(model))

    apart = export(TrainedModel(model, None, None), tmp_path / "apart")
    merged = export(TrainedModel(again, None, None), tmp_path / "merged", merge=True)
    assert (apart / "adapter").exists()
    assert not (merged / "adapter").exists()
    for folder in (apart, merged):
        loaded = load_exported(folder)[0].model
        assert not quantization.quantized_layers(loaded)
        assert "quantization" not in (folder / "config.json").read_text()
        with torch.no_grad():
            torch.testing.assert_close(loaded(batch), expected, rtol=1e-4, atol=1e-4)


@needs_package
@torch.no_grad()
def test_a_run_from_an_export_may_hold_its_llm_in_4_bits(tmp_path):
    torch.manual_seed(0)
    plain = build_model(model_node("modality_adaptive", llm=llm_fields(**WIDTHS)), VOCAB)[0].eval()
    folder = export(TrainedModel(plain, None, None), tmp_path / "out")
    base = load_base(str(folder), node("modality_adaptive"), VOCAB).eval()
    batch = make_batch(ROWS, base.fusion.tokens_per_image)
    fresh = build("modality_adaptive")
    assert torch.equal(base(batch), fresh(batch))
    assert (base(batch) - plain(batch)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        # their weights are read, or asked for their type, without a call of the layer
        ("jamba", "dt_proj"),
        ("deepseek_v32", "weights_proj"),
    ],
)
def test_layers_that_a_family_cannot_use_in_4_bits_keep_their_type(family, layer):
    with torch.device("meta"):
        llm = load_llm(VOCAB, config=small_fields(family))
        kept = {name for name, _ in llm.named_modules() if name.endswith(layer)}
        for module in llm.modules():
            if type(module) is torch.nn.Linear and module.in_features % quantization.BLOCK:
                # of no whole blocks in so small an LLM
                width = module.in_features + -module.in_features % quantization.BLOCK
                module.in_features = width
                module.weight = torch.nn.Parameter(torch.empty(module.out_features, width))
        quantization.quantize(llm, quantization.Quantization())
    assert kept
    assert not kept & set(quantization.quantized_layers(llm))
    assert quantization.quantized_layers(llm)


@pytest.mark.parametrize("width", [64, 32])
def test_an_export_that_transformers_quantizes_has_rows_of_whole_blocks_on_a_cpu(width, tmp_path):
    """transformers puts any linear layer in 4 bits, whatever bitsandbytes makes of it."""
    widths = WIDTHS | {"hidden_size": width}
    model = build_model(model_node("concat", llm=llm_fields(**widths)), VOCAB)[0]
    export(TrainedModel(model, None, None), tmp_path / "out")
    options = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["model.vision", "model.connector"]
    )
    load = OwlfuseForConditionalGeneration.from_pretrained
    if width == 64:
        assert quantization.quantized_layers(load(tmp_path / "out", quantization_config=options))
    else:
        with pytest.raises(ValueError, match="has rows of 32 numbers"):
            load(tmp_path / "out", quantization_config=options)
