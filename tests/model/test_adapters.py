"""Policies by the names of the parameters that they train, on every fusion."""

import fnmatch

import pytest
import torch
from torch import nn

from families import small_fields
from helpers import (
    CONNECTORS,
    CROSS_ATTENTION,
    FROZEN,
    FUSIONS,
    ROWS,
    VIT,
    VOCAB,
    each,
    gradients,
    llm_fields,
    loss_of,
    make_batch,
    make_model,
    model_node,
    perturb,
    policy,
    yaml_nodes,
)
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel, load_exported
from owlfuse.artifacts.weights import check_trained_precision
from owlfuse.model.adapters import (
    PARTS,
    LoRA,
    Part,
    PartSummary,
    apply_adapters,
    layer_name,
    print_summary,
)
from owlfuse.model.multimodal import build_model

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

WITH_PARAMETERS = [
    (fusion, part) for fusion in FUSIONS for part in PARTS if (fusion, part) != ("concat", "fusion")
]


def frozen_but(**policies):
    return {**FROZEN, **policies}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def belongs_to(name):
    """The part of a parameter, by its name alone."""
    if name.startswith(("vision.", "connector.", "fusion.")):
        return name.split(".")[0]
    return "fusion" if ".visual." in name or ".vision." in name else "llm"


def names_of(model, part):
    return {name for name, _ in model.named_parameters() if belongs_to(name) == part}


def has(model, part):
    return bool(names_of(model, part))


# Which parameters are trained


@pytest.mark.parametrize(("fusion", "part"), WITH_PARAMETERS)
@pytest.mark.fast_cases(8)
def test_full_trains_all_of_its_part_and_nothing_else(fusion, part):
    model = make_model(fusion, adapter=frozen_but(**{part: policy("Full")}))
    assert trained(model) == names_of(model, part)


@each(FUSIONS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.fast_cases(8)
def test_frozen_leaves_all_the_others_trained(node, part):
    model = make_model(node, adapter={part: policy("Frozen")})
    assert trained(model) == {name for name, _ in model.named_parameters()} - names_of(model, part)


@pytest.mark.parametrize(("fusion", "part"), WITH_PARAMETERS)
@pytest.mark.fast_cases(8)
def test_lora_trains_its_low_rank_matrices_of_its_part_and_nothing_else(fusion, part):
    model = make_model(fusion, adapter=frozen_but(**{part: policy("LoRA", r=2)}))
    names = trained(model)
    assert names
    assert all("lora_" in name and belongs_to(name) == part for name in names)
    assert names == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("others", ["Full", "Frozen"])
@pytest.mark.fast_cases(4)
def test_lora_on_fusion_and_llm_leaves_the_layers_below_both_frozen(fusion, others):
    rest = {"vision": policy(others), "connector": policy(others)}
    model = make_model(fusion, adapter={**rest, "fusion": policy("LoRA"), "llm": policy("LoRA")})
    inside = {name for name in trained(model) if belongs_to(name) in ("fusion", "llm")}
    assert {name for name in inside if "lora_" not in name} == set()
    assert inside == {
        n
        for n, _ in model.named_parameters()
        if "lora_" in n and belongs_to(n) in ("fusion", "llm")
    }
    outside = trained(model) - inside
    assert outside == (
        names_of(model, "vision") | names_of(model, "connector") if others == "Full" else set()
    )


@pytest.mark.parametrize(
    ("fusion_policy", "llm_policy"),
    [("Full", "LoRA"), ("LoRA", "Full"), ("LoRA", "Frozen"), ("Frozen", "LoRA")],
)
@pytest.mark.parametrize("fusion", ["modality_adaptive", "hyperattention-adaptive"])
def test_the_parts_that_share_the_llm_do_not_change_each_others_policy(
    fusion, fusion_policy, llm_policy
):
    model = make_model(
        fusion, adapter=frozen_but(fusion=policy(fusion_policy), llm=policy(llm_policy))
    )
    for part, name in (("fusion", fusion_policy), ("llm", llm_policy)):
        own = {n for n in trained(model) if belongs_to(n) == part}
        of_part = names_of(model, part)
        expected = {"Full": of_part, "Frozen": set(), "LoRA": {n for n in of_part if "lora_" in n}}[
            name
        ]
        assert own == expected


def test_lora_on_fusion_reaches_the_visual_copies_and_on_llm_the_text():
    both = make_model(
        "modality_adaptive", adapter=frozen_but(fusion=policy("LoRA"), llm=policy("LoRA"))
    )
    found = {n.rsplit(".lora_", 1)[0] for n, _ in both.named_parameters() if "lora_" in n}
    attention = [f"llm.model.layers.{i}.self_attn" for i in range(3)]
    visual = {f"{path}.{name}.vision" for path in attention for name in ("k_proj", "v_proj")}
    text = {f"{path}.{name}.text" for path in attention for name in ("k_proj", "v_proj")}
    shared = {f"{path}.{name}" for path in attention for name in ("q_proj", "o_proj")}
    mlp = {
        f"llm.model.layers.{i}.mlp.{name}"
        for i in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert found == visual | text | shared | mlp
    fusion = make_model("modality_adaptive", adapter=frozen_but(fusion=policy("LoRA")))
    assert {n.rsplit(".lora_", 1)[0] for n in trained(fusion)} == visual
    llm = make_model("modality_adaptive", adapter=frozen_but(llm=policy("LoRA")))
    assert {n.rsplit(".lora_", 1)[0] for n in trained(llm)} == text | shared | mlp


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_lora_never_reaches_the_head(fusion, tied):
    model = make_model(
        fusion, llm=llm_fields(tie_word_embeddings=tied), adapter=frozen_but(llm=policy("LoRA"))
    )
    assert trained(model)
    assert not any("lm_head" in name or "embed_tokens" in name for name in trained(model))
    assert isinstance(model.llm.lm_head, nn.Linear)


@each(FUSIONS)
def test_lora_targets_are_the_layers_that_have_those_names(node):
    adapter = frozen_but(llm=policy("LoRA", r=3, targets=["q_proj", "v_proj"]))
    model = make_model(node, adapter=adapter)
    layers = {name.rsplit(".lora_", 1)[0].removesuffix(".text") for name in trained(model)}
    assert layers == {
        f"llm.model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")
    }
    ranks = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {3}


@pytest.mark.parametrize("n", [1, 2, 3])
@each(FUSIONS)
def test_last_n_of_an_llm_trains_exactly_its_last_decoder_layers(node, n):
    model = make_model(node, adapter=frozen_but(llm=policy("LastN", n=n)))
    patterns = [f"llm.model.layers.{i}.*" for i in range(3 - n, 3)]
    expected = {
        x
        for x in names_of(model, "llm")
        if any(fnmatch.fnmatchcase(x, pattern) for pattern in patterns)
    }
    assert trained(model) == expected


@pytest.mark.parametrize("n", [1, 2])
def test_last_n_of_a_vit_trains_exactly_its_last_blocks_and_the_norm_after_them(n):
    model = make_model(adapter=frozen_but(vision=policy("LastN", n=n)))
    blocks = {
        int(name.split(".")[3]) for name in trained(model) if name.startswith("vision.body.blocks.")
    }
    assert blocks == set(range(3 - n, 3))
    everything = {
        x
        for x in names_of(model, "vision")
        if x.startswith(tuple(f"vision.body.blocks.{b}." for b in blocks))
    }
    assert trained(model) == everything | {"vision.body.norm.weight", "vision.body.norm.bias"}


@pytest.mark.parametrize("output", ["last", "penultimate"])
def test_last_n_of_a_backbone_counts_from_the_last_block_that_it_uses(output):
    vision = {**model_node()["vision"], "output": output}
    model = make_model(vision=vision, adapter=frozen_but(vision=policy("LastN", n=1)))
    blocks = {name.split(".")[3] for name in trained(model) if ".blocks." in name}
    assert blocks == ({"2"} if output == "last" else {"1"})


def test_last_n_of_an_abstractor_trains_its_last_layers():
    model = make_model(
        connector=CONNECTORS["abstractor"], adapter=frozen_but(connector=policy("LastN", n=1))
    )
    assert trained(model) == {
        name for name in names_of(model, "connector") if name.startswith("connector.layers.1.")
    }


# What lora does to the logits


@torch.no_grad()
@each(FUSIONS)
def test_lora_changes_no_logit_before_it_is_trained(node):
    plain = make_model(node)
    lora = dict.fromkeys(("vision", "connector", "llm"), policy("LoRA"))
    torch.manual_seed(0)
    model = make_model(node, adapter={**lora, "fusion": policy("LoRA")})
    weights = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()
    }
    plain.load_state_dict({name: value for name, value in weights.items() if "lora_" not in name})
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    torch.testing.assert_close(model(batch), plain(batch), rtol=0, atol=0)


@torch.no_grad()
@each(FUSIONS)
@pytest.mark.fast_cases(2)
def test_each_part_s_lora_acts_on_the_logits_when_all_parts_have_one(node):
    model = make_model(node, adapter=dict.fromkeys(PARTS, policy("LoRA")))
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    for part in PARTS:
        updates = [
            p for n, p in model.named_parameters() if "lora_B" in n and belongs_to(n) == part
        ]
        if not has(model, part):
            continue
        assert updates, part
        for update in updates:
            before = model(batch)
            perturb([update], scale=0.5)
            assert (model(batch) - before).abs().max() > 1e-5


@torch.no_grad()
def test_lora_adds_b_times_a_scaled_by_alpha_over_r():
    model = make_model(adapter=frozen_but(connector=policy("LoRA", r=2, alpha=6.0)))
    layer = model.connector.proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    perturb([b])
    x = torch.randn(3, 16)
    expected = x @ (layer.base_layer.weight + 3.0 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_training_moves_the_trained_parameters_and_no_other():
    adapter = {
        "vision": policy("LastN", n=1),
        "connector": policy("Full"),
        "fusion": policy("LoRA"),
        "llm": policy("LoRA"),
    }
    model = make_model("modality_adaptive", adapter=adapter).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    for _ in range(2):  # lora_A moves from the second step on, lora_B being zero in the first
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(model)


# The table


@each(FUSIONS)
@pytest.mark.parametrize("name", ["Full", "LoRA", "Frozen"])
@pytest.mark.fast_cases(6)
def test_the_table_counts_what_is_trained_and_what_is_frozen(node, name):
    adapter = {
        "connector": policy("Full"),
        "vision": policy("LastN", n=1),
        "fusion": policy(name),
        "llm": policy(name),
    }
    model, summaries = build_model(model_node(node, adapter=adapter), VOCAB)
    assert [summary.part for summary in summaries] == list(PARTS)
    for summary in summaries:
        counts = {True: 0, False: 0}
        for n, parameter in model.named_parameters():
            if belongs_to(n) == summary.part:
                counts[parameter.requires_grad] += parameter.numel()
        assert (summary.trained, summary.frozen) == (counts[True], counts[False])
        assert summary.policy == adapter[summary.part]["_target_"].rsplit(".", 1)[1]
    assert sum(s.trained + s.frozen for s in summaries) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_tied_head_is_counted_once():
    model, summaries = build_model(model_node(llm=llm_fields(tie_word_embeddings=True)), VOCAB)
    llm = next(s for s in summaries if s.part == "llm")
    assert llm.trained == sum(p.numel() for p in set(model.llm.parameters()))


def test_the_printed_table_gives_each_part_and_the_total(capsys):
    print_summary([PartSummary("vision", "Frozen", 0, 1000), PartSummary("llm", "LoRA", 234, 5000)])
    printed = capsys.readouterr().out.splitlines()
    rows = [line.replace("│", " ").split() for line in printed]
    assert ["vision", "Frozen", "0", "1,000"] in rows
    assert ["llm", "LoRA", "234", "5,000"] in rows
    assert ["all", "234", "6,000"] in rows


# Errors


def test_an_unknown_target_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"adapter.llm: targets \['qproj'\] are no linear layers of llm, which has"
    ) as error:
        make_model(adapter=frozen_but(llm=policy("LoRA", targets=["q_proj", "qproj"])))
    known = str(error.value).split("which has", 1)[1]
    assert all(name in known for name in PROJECTIONS)
    assert "lm_head" not in known


def test_a_target_of_the_other_part_is_unknown():
    with pytest.raises(ValueError, match=r"adapter.fusion: targets \['q_proj'\] .*kv_proj"):
        make_model(
            "hyperattention-adaptive", adapter=frozen_but(fusion=policy("LoRA", targets=["q_proj"]))
        )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_everything_frozen_is_an_error(fusion):
    with pytest.raises(ValueError, match="adapter: every part is frozen"):
        make_model(fusion, adapter=FROZEN)


def test_a_fusion_without_parameters_counts_as_nothing_to_train():
    with pytest.raises(ValueError, match="adapter: every part is frozen"):
        make_model("concat", adapter=frozen_but(fusion=policy("Full")))


@pytest.mark.parametrize(("part", "n"), [("llm", 4), ("llm", 0), ("vision", 9), ("connector", 1)])
def test_more_layers_than_there_are_is_an_error_with_both_numbers(part, n):
    with pytest.raises(ValueError, match=rf"adapter.{part}: n is {n}, and the part has \d+ layers"):
        make_model(adapter=frozen_but(**{part: policy("LastN", n=n)}))


def test_a_rank_under_one_is_an_error():
    with pytest.raises(ValueError, match=r"adapter.llm: r is 0"):
        make_model(adapter=frozen_but(llm=policy("LoRA", r=0)))


def test_lora_on_a_part_without_linear_layers_is_an_error():
    part = Part(
        "vision", nn.Sequential(nn.Conv2d(3, 4, 1)), {"0.weight": nn.Parameter(torch.zeros(1))}
    )
    with pytest.raises(ValueError, match="no linear layer"):
        LoRA().apply(part)


def test_a_layers_name_is_its_last_word_and_that_of_its_copies():
    assert layer_name("layers.0.self_attn.k_proj") == "k_proj"
    assert (
        layer_name("layers.0.self_attn.k_proj.vision")
        == layer_name("layers.0.self_attn.k_proj.text")
        == "k_proj"
    )
    assert layer_name("proj") == "proj"


# Every policy of configs/model/adapter


@each({**yaml_nodes("adapter"), "full by hand": policy("Full")})
@pytest.mark.parametrize("part", ["vision", "llm"])
def test_every_yaml_trains_something_or_is_the_frozen_one(node, part):
    other = "llm" if part == "vision" else "vision"
    model = make_model("modality_adaptive", adapter={part: node, other: policy("Frozen")})
    own = {name for name in trained(model) if belongs_to(name) == part}
    assert bool(own) == (not node["_target_"].endswith("Frozen"))
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    assert all(
        gradient is not None for gradient in gradients(model, loss_of(model(batch), batch)).values()
    )


def test_policies_apply_part_by_part_to_any_model_that_has_parts():
    """`apply_adapters` asks a model for its parts and no more."""
    layers = {name: nn.Linear(2, 2) for name in PARTS}

    class Parted:
        def part(self, name):
            return Part(name, layers[name], dict(layers[name].named_parameters()))

    class Seen:
        def __init__(self):
            self.names = []

        def apply(self, part):
            self.names.append(part.name)

    seen = Seen()
    summaries = apply_adapters(Parted(), dict.fromkeys(PARTS, seen))
    assert seen.names == list(PARTS)
    assert [s.trained for s in summaries] == [6] * 4


def test_updates_of_an_llm_in_16_bits_are_in_32():
    model = make_model(adapter={"llm": policy("LoRA", r=2)}, dtype="bfloat16")
    dtypes = {name: p.dtype for name, p in model.llm.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" not in name} == {torch.bfloat16}
    loss_of(model(make_batch(ROWS)), make_batch(ROWS)).backward()


def test_all_linear_leaves_the_head_out_whatever_its_name():
    fields = {
        "model_type": "gpt_neox_japanese",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_multiple_size": 2,
    }
    model = make_model(llm=fields, adapter={"llm": policy("LoRA", r=2)})
    updated = [name for name, _ in model.llm.named_parameters() if ".lora_A" in name]
    assert updated
    assert not any("embed_out" in name for name in updated)


def test_lora_of_a_cross_attention_opens_its_gates_with_its_updates():
    node = {"_target_": CROSS_ATTENTION, "layers": [0, 2], "mlp": True}
    model = make_model(node, adapter={**FROZEN, "fusion": policy("LoRA", r=2)})
    gates = {n: p for n, p in model.llm.named_parameters() if n.endswith(("gate", "mlp_gate"))}
    assert len(gates) == 4
    batch = make_batch(ROWS)
    found = gradients(model, loss_of(model(batch), batch))
    for name in gates:
        assert found[f"llm.{name}"].any()
    model.check_start()


def test_closed_gates_that_are_frozen_are_refused_at_the_start_alone():
    node = {"_target_": CROSS_ATTENTION, "layers": [0, 2]}
    frozen = make_model(node, adapter={"fusion": policy("Frozen")})
    with pytest.raises(ValueError, match="adapter.fusion: its gates begin closed"):
        frozen.check_start()
    make_model({**node, "gate": "none"}, adapter={"fusion": policy("Frozen")}).check_start()


def test_a_norm_of_a_frozen_backbone_is_said_to_have_no_effect(caplog):
    vision = {**VIT, "norm": True}
    make_model(vision=vision).check_start()
    assert not caplog.records
    for name in ("Frozen", "LoRA"):
        caplog.clear()
        make_model(vision=vision, adapter={"vision": policy(name)}).check_start()
        assert "model.vision.norm has no effect" in caplog.text


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str
)
@pytest.mark.fast_cases(1)
def test_lora_reaches_layers_that_hold_their_weights_transposed(options, tmp_path, recwarn):
    lora = policy("LoRA", r=2, **options)
    model = make_model(llm=GPT2, adapter={**FROZEN, "llm": lora})
    layers = {n.partition(".lora_A")[0] for n, _ in model.llm.named_parameters() if ".lora_A" in n}
    assert {layer_name(name) for name in layers} == {"c_attn", "c_proj", "c_fc"}
    batch = make_batch(ROWS)
    with torch.no_grad():
        before = model(batch)
        for parameter in model.llm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(batch)
        assert (expected - before).abs().max() > 1e-2
        kept = export(TrainedModel(model, None, None), tmp_path / "kept")
        torch.testing.assert_close(load_exported(kept)[0].model(batch), expected)
        merged = export(TrainedModel(model, None, None), tmp_path / "merged", merge=True)
        torch.testing.assert_close(
            load_exported(merged)[0].model(batch), expected, rtol=1e-4, atol=1e-4
        )
    assert not [str(one.message) for one in recwarn if "fan_in_fan_out" in str(one.message)]


def test_olora_of_transposed_weights_is_refused():
    lora = policy("LoRA", r=2, init_lora_weights="olora")
    with pytest.raises(ValueError, match="olora takes weights as linear layers hold them"):
        make_model(llm=GPT2, adapter={"llm": lora})


def test_updates_are_not_put_where_a_kernel_reads_the_weight():
    fields = {**small_fields("granitemoehybrid"), "vocab_size": VOCAB}
    with torch.device("meta"):
        node = model_node(llm=fields, adapter={**FROZEN, "llm": policy("LoRA", r=2)})
        model, _ = build_model(node, VOCAB)
    updated = [name for name, _ in model.llm.named_parameters() if ".lora_A" in name]
    assert any("mamba.in_proj" in name for name in updated)
    assert not any("mamba.out_proj" in name for name in updated)
    with torch.device("meta"):
        # its linear attention calls the layer
        node = {**node, "llm": {**node["llm"], "config": small_fields("qwen3_next")}}
        model, _ = build_model(node, VOCAB)
    assert any("linear_attn.out_proj.lora_A" in name for name, _ in model.llm.named_parameters())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_updates_are_not_put_where_a_backbone_reads_the_weight(name, caplog):
    kwargs = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    if name.startswith("eva"):
        kwargs["qkv_fused"] = True
    vision = {**VIT, "name": name, "kwargs": kwargs}
    node = model_node(vision=vision, adapter={**FROZEN, "vision": policy("LoRA", r=2)})
    with torch.device("meta"):
        model, _ = build_model(node, VOCAB)
    updated = [name for name, _ in model.vision.named_parameters() if ".lora_A" in name]
    assert any("attn.proj" in name for name in updated)
    assert not any("qkv" in name for name in updated)
    assert "adapter.vision: all-linear leaves out qkv" in caplog.text


def test_a_backbone_that_calls_its_layers_gets_all_updates(caplog):
    make_model(adapter={**FROZEN, "vision": policy("LoRA", r=2)})
    assert "leaves out" not in caplog.text


def test_gates_beside_an_llm_in_16_bits_are_trained_in_32_and_come_back(tmp_path):
    lora = policy("LoRA", r=2)
    model = make_model(
        "cross_attention-after", adapter={**FROZEN, "fusion": lora}, dtype="bfloat16"
    )
    check_trained_precision(model, "32-true", {})
    part = model.part("fusion")
    assert {part.parameters[name].dtype for name in part.closed_gates} == {torch.float32}
    perturb(p for p in model.parameters() if p.requires_grad)
    batch = make_batch(ROWS)
    loss_of(model(batch), batch).backward()
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_exported(out)[0].model(batch), model(batch))
