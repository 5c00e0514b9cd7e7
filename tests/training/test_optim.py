"""Which parameters are trained by which rule, and at which learning rate."""

from copy import deepcopy

import pytest
import torch

from families import small_fields
from helpers import CONNECTORS, VIT, VOCAB, make_model
from owlfuse.core.errors import ConfigError
from owlfuse.model.llm import load_llm
from owlfuse.training.optim import AdamWCosine, MuonCosine, check_groups, has_decay


def groups_by_parameter(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = make_model("hyperattention-adaptive")
    optimizer = MuonCosine(lr=4e-3, part_lr={"vision": 1e-3}).build(model, 10)["optimizer"]
    group_of = groups_by_parameter(optimizer)
    assert set(group_of) == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of)
    query = group_of[id(model.llm.model.layers[0].self_attn.q_proj.weight)]
    table = group_of[id(model.llm.get_input_embeddings().weight)]
    norm = group_of[id(model.llm.model.layers[0].input_layernorm.weight)]
    kernel = group_of[id(next(p for p in model.vision.parameters() if p.ndim == 4))]
    assert (query["muon"], query["initial_lr"]) == (True, 4e-3)
    for group, lr in ((table, 2e-3), (norm, 2e-3), (kernel, 5e-4)):
        assert (group["muon"], group["initial_lr"]) == (False, lr)
    assert norm["weight_decay"] == 0


def singular_ratio(matrix: torch.Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values.max() / values.min())


def test_a_step_of_muon_evens_out_singular_values_and_adamw_steps_at_half_the_rate():
    torch.manual_seed(0)
    model = make_model("concat")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    matrix = model.llm.model.layers[0].mlp.gate_proj.weight
    norm = model.llm.model.layers[0].input_layernorm.weight
    before = [p.detach().clone() for p in (matrix, norm)]
    optimizer = MuonCosine(lr=4e-3, weight_decay=0.0).build(model, 10)["optimizer"]
    optimizer.step()
    assert singular_ratio(before[0] - matrix.detach()) < 2 < singular_ratio(matrix.grad)
    assert (before[1] - norm.detach()).abs().mean().item() == pytest.approx(2e-3, rel=0.01)


def test_muon_steps_by_its_formula_and_adamw_by_torch_s():
    """Three steps beside a double-precision Muon by hand (arXiv 2502.16982, equation 4) and a
    plain AdamW of the parameters that are no matrices."""
    torch.manual_seed(0)
    model = make_model("concat")
    matrix = model.llm.model.layers[0].mlp.gate_proj.weight
    norm = model.llm.model.layers[0].input_layernorm.weight
    expected, momentum = matrix.detach().double(), torch.zeros_like(matrix, dtype=torch.double)
    twin = torch.nn.Parameter(norm.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0)
    optimizer = MuonCosine(lr=4e-3, weight_decay=0.1).build(model, 10**9)["optimizer"]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        twin.grad = norm.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]  # without the schedule
        optimizer.step()
        adamw.step()
        momentum = 0.95 * momentum + 0.05 * matrix.grad
        update = 0.95 * momentum + 0.05 * matrix.grad
        update = update / update.norm()
        for _ in range(5):
            gram = update @ update.T if update.shape[0] <= update.shape[1] else update.T @ update
            scale = 3.4445 * torch.eye(len(gram)) - 4.7750 * gram + 2.0315 * gram @ gram
            update = scale @ update if update.shape[0] <= update.shape[1] else update @ scale
        expected = expected * (1 - 4e-3 * 0.1)
        expected = expected - 4e-3 * 0.2 * max(matrix.shape) ** 0.5 * update
    assert torch.equal(norm, twin)
    step = 4e-3 * 0.2 * max(matrix.shape) ** 0.5
    # in bfloat16, as on a GPU, the entries of a step would be right to a hundredth
    assert (matrix - expected).abs().max() < 1e-4 * step * 3


def test_a_state_of_timm_s_muon_is_refused_in_one_line():
    optimizer = MuonCosine().build(make_model("concat"), 10)["optimizer"]
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["muon"]
    with pytest.raises(
        ConfigError, match="timm's Muon, expected torch's; .* init_from= of its export"
    ):
        optimizer.load_state_dict(state)


def test_a_reloaded_state_of_muon_goes_on_alike():
    torch.manual_seed(0)
    optim = MuonCosine(lr=4e-3)
    model = make_model("concat")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = optim.build(model, 10)["optimizer"]
    optimizer.step()
    twin = make_model("concat")
    twin.load_state_dict(model.state_dict())
    again = optim.build(twin, 10)["optimizer"]
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    again.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_checkpoint_with_other_parameter_groups_is_refused_in_one_line():
    model = make_model("concat")
    groups = AdamWCosine().groups(model)
    saved = AdamWCosine().build(model, 10)["optimizer"].state_dict()["param_groups"]
    check_groups(saved, groups)
    with pytest.raises(
        ConfigError, match=r"optim: .* has llm otherwise .* differ.* init_from= of its export"
    ):
        check_groups(saved, AdamWCosine(layer_decay={"llm": 0.9}).groups(model))


def test_adamw_trains_every_parameter_once():
    model = make_model("modality_adaptive")
    optimizer = AdamWCosine().build(model, 10)["optimizer"]
    assert set(groups_by_parameter(optimizer)) == {
        id(p) for p in model.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("optim", [AdamWCosine, MuonCosine])
def test_layer_decay_gives_each_layer_its_share_of_the_next_one_s_rate(optim):
    model = make_model("concat")
    group_of = groups_by_parameter(
        optim(lr=1e-3, layer_decay={"vision": 0.5}).build(model, 10)["optimizer"]
    )
    assert set(group_of) == {id(p) for p in model.parameters() if p.requires_grad}
    body = model.vision.body
    rates = [group_of[id(block.attn.qkv.weight)]["initial_lr"] for block in body.blocks]
    assert rates == pytest.approx([rates[-1] * 0.5 ** (2 - i) for i in range(3)])
    share = 1 if optim is AdamWCosine else 0.5  # AdamW of what Muon does not train
    kernel = body.patch_embed.proj.weight
    assert group_of[id(body.norm.weight)]["initial_lr"] == share * 1e-3
    assert group_of[id(kernel)]["initial_lr"] == pytest.approx(rates[0] * 0.5 * share)
    query = model.llm.model.layers[0].self_attn.q_proj.weight
    assert group_of[id(query)]["initial_lr"] == 1e-3
    names = [group["name"] for group in optim(layer_decay={"vision": 0.5}).groups(model)]
    assert len(set(names)) == len(names)


def test_layer_decay_counts_embeddings_of_an_llm_before_its_first_layer():
    model = make_model("concat")
    group_of = groups_by_parameter(
        AdamWCosine(lr=1e-3, layer_decay={"llm": 0.5}).build(model, 10)["optimizer"]
    )
    layers = model.llm.model.layers
    first = group_of[id(layers[0].self_attn.q_proj.weight)]["initial_lr"]
    assert first == pytest.approx(1e-3 * 0.5 ** (len(layers) - 1))
    embeddings = group_of[id(model.llm.get_input_embeddings().weight)]
    assert embeddings["initial_lr"] == pytest.approx(first * 0.5)
    assert embeddings["name"] == "llm_-1"
    for last in (model.llm.model.norm, model.llm.get_output_embeddings()):
        assert group_of[id(last.weight)]["initial_lr"] == 1e-3


def test_layer_decay_of_a_part_without_layers_is_refused():
    with pytest.raises(ValueError, match="layer_decay: connector has no layers"):
        AdamWCosine(layer_decay={"connector": 0.9}).groups(make_model("concat"))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_adamw_trains_tables_of_positions_too(family):
    model = make_model("concat", llm=small_fields(family))
    group_of = groups_by_parameter(MuonCosine().build(model, 10)["optimizer"])
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert len(tables) >= 2
    assert not any(group_of[id(table)]["muon"] for table in tables)


def test_layer_decay_counts_the_end_token_of_an_abstractor_with_its_last_layer():
    model = make_model(connector=CONNECTORS["abstractor"])
    group_of = groups_by_parameter(
        AdamWCosine(lr=1e-3, layer_decay={"connector": 0.5}).build(model, 10)["optimizer"]
    )
    assert group_of[id(model.connector.end_token)]["initial_lr"] == 1e-3


@pytest.mark.parametrize("optim", [AdamWCosine, MuonCosine])
def test_what_is_learned_in_place_of_an_input_has_no_decay_and_no_muon(optim):
    model = make_model(
        connector={
            "_target_": "owlfuse.model.connectors.resampler.Resampler",
            "queries": 4,
            "layers": 1,
        },
        llm=small_fields("gpt2"),
    )
    group_of = groups_by_parameter(optim(lr=1e-3).build(model, 10)["optimizer"])
    for parameter in (model.connector.latents, model.llm.transformer.wpe.weight):
        group = group_of[id(parameter)]
        assert group["weight_decay"] == 0
        assert not group.get("muon")


def test_biases_of_several_experts_in_one_tensor_have_no_decay():
    with torch.device("meta"):
        llm = load_llm(VOCAB, config=small_fields("gpt_oss"))
    biases = {name: p for name, p in llm.named_parameters() if name.endswith("bias")}
    assert [name for name, p in biases.items() if p.ndim > 1]
    assert not [name for name, p in biases.items() if has_decay(name, p)]


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.attention_biases",
        "blocks.0.attn.rel_pos_h",
        "pos_embed_0",
        "pos_embed1",
        "pos_embed_x",
        "pos_embed_window",
        "cls_token_1",
        "patch_pos",
        "blocks.0.attn.temperature",
        "layers.0.mamba.A_log",
    ],
)
def test_positions_and_scales_by_timms_other_names_have_no_decay(name):
    assert not has_decay(name, torch.nn.Parameter(torch.zeros(2, 3)))
    assert has_decay("blocks.0.attn.qkv.weight", torch.nn.Parameter(torch.zeros(2, 3)))


def test_muon_says_what_of_a_mixtures_experts_it_does_not_train(caplog):
    model = make_model("concat", llm=small_fields("mixtral"))
    MuonCosine().build(model, 10)
    experts = [p for p in model.llm.parameters() if p.ndim == 3]
    assert f"{sum(p.numel() for p in experts):,} numbers of the LLM" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_lr_ratio", 10),
        ("warmup_steps", -50),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("eps", -1.0),
    ],
)
@pytest.mark.parametrize("optim", [AdamWCosine, MuonCosine])
def test_a_number_that_turns_the_schedule_or_the_decay_round_is_refused(optim, key, value):
    with pytest.raises(ValueError, match=f"optim.{key} is .*, expected"):
        optim(**{key: value})


def test_a_warm_up_longer_than_the_run_is_told(caplog):
    model = make_model("concat")
    AdamWCosine(warmup_steps=50).build(model, 51)
    assert "warmup_steps" not in caplog.text
    AdamWCosine(warmup_steps=50).build(model, 40)
    assert "the learning rate comes to 78 % of its peak" in caplog.text


def test_a_mean_of_squares_that_could_not_fall_in_bfloat16_is_refused():
    AdamWCosine(betas=(0.9, 0.98)).check_precision("bf16-true")
    for precision in ("32-true", "bf16-mixed", "16-true"):
        AdamWCosine(betas=(0.9, 0.999)).check_precision(precision)
    with pytest.raises(ValueError, match="optim.betas: in bf16-true .* never falls"):
        MuonCosine(betas=(0.9, 0.999)).check_precision("bf16-true")
    # as the message says
    square = torch.tensor(1.0, dtype=torch.bfloat16)
    assert square * 0.999 == square != square * 0.99


def test_what_timms_model_names_has_no_decay():
    model = make_model("concat", vision={**VIT, "name": "vit_tiny_patch16_224"})
    model.vision.body.no_weight_decay = lambda: {"blocks.0.attn.qkv.weight"}
    group_of = groups_by_parameter(AdamWCosine().build(model, 10)["optimizer"])
    first, second = (block.attn.qkv.weight for block in model.vision.body.blocks[:2])
    assert [group_of[id(weight)]["weight_decay"] for weight in (first, second)] == [0.0, 0.05]
