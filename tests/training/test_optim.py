"""Which parameters are trained by which rule, and at which learning rate."""

from copy import deepcopy

import pytest
import torch
from timm.optim import Muon
from timm.optim.muon import _COEFFICIENTS, zeropower_via_newtonschulz

from helpers import make_model
from owlfuse.training.optim import AdamWCosine, MuonCosine


def groups_by_parameter(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = make_model("hyperattention-adaptive")
    optimizer = MuonCosine(lr=4e-3, part_lr={"vision": 1e-3}).build(model, 10)["optimizer"]
    assert isinstance(optimizer, Muon)
    group_of = groups_by_parameter(optimizer)
    assert set(group_of) == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of)
    query = group_of[id(model.llm.model.layers[0].self_attn.q_proj.weight)]
    table = group_of[id(model.llm.get_input_embeddings().weight)]
    norm = group_of[id(model.llm.model.layers[0].input_layernorm.weight)]
    kernel = group_of[id(next(p for p in model.vision.parameters() if p.ndim == 4))]
    assert (query["use_fallback"], query["initial_lr"]) == (False, 4e-3)
    for group, lr in ((table, 4e-3), (norm, 4e-3), (kernel, 1e-3)):
        assert (group["use_fallback"], group["initial_lr"]) == (True, lr)
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


@pytest.mark.parametrize(("kind", "least", "most"), [("float32", 0, 1e-4), ("bfloat16", 1e-3, 0.1)])
def test_muon_makes_a_matrix_orthogonal_in_the_type_that_is_asked_for(kind, least, most):
    torch.manual_seed(0)
    model = make_model("concat")
    matrix = model.llm.model.layers[0].mlp.gate_proj.weight
    matrix.grad = torch.randn_like(matrix)
    before = matrix.detach().clone()
    built = MuonCosine(lr=4e-3, weight_decay=0.0, newton_schulz=kind).build(model, 10)
    built["optimizer"].step()
    step = before - matrix.detach()
    exact = zeropower_via_newtonschulz(
        matrix.grad, 5, _COEFFICIENTS["quintic"], dtype=torch.float64
    )
    apart = (step / step.norm() - exact / exact.norm()).abs().max() * step.numel() ** 0.5
    assert least < apart < most


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
    assert group_of[id(body.norm.weight)]["initial_lr"] == 1e-3
    assert group_of[id(body.patch_embed.proj.weight)]["initial_lr"] == pytest.approx(rates[0] * 0.5)
    assert all(group_of[id(p)]["initial_lr"] == 1e-3 for p in model.llm.parameters())
    names = [group["name"] for group in optim(layer_decay={"vision": 0.5}).groups(model)]
    assert len(set(names)) == len(names)


def test_layer_decay_of_a_part_without_layers_is_refused():
    with pytest.raises(ValueError, match="layer_decay: connector has no layers"):
        AdamWCosine(layer_decay={"connector": 0.9}).groups(make_model("concat"))
