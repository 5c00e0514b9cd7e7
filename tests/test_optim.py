"""Which parameters are trained by which rule, and at which learning rate."""

from copy import deepcopy as copy_of

import torch
from timm.optim import Muon

from helpers import make_model
from owlfuse.optim import AdamWCosine, MuonCosine


def groups_by_parameter(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = make_model("hyperattention-adaptive")
    optimizer = MuonCosine(lr=4e-3, fallback_lr_scale=0.5, part_lr={"vision": 1e-3}).build(model, 10)["optimizer"]
    assert isinstance(optimizer, Muon)
    group_of = groups_by_parameter(optimizer)
    assert set(group_of) == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of)
    query = group_of[id(model.llm.model.layers[0].self_attn.q_proj.weight)]
    table = group_of[id(model.llm.get_input_embeddings().weight)]
    norm = group_of[id(model.llm.model.layers[0].input_layernorm.weight)]
    kernel = group_of[id(next(p for p in model.vision.parameters() if p.ndim == 4))]
    assert (query["use_fallback"], query["initial_lr"]) == (False, 4e-3)
    for group, lr in ((table, 2e-3), (norm, 2e-3), (kernel, 5e-4)):
        assert (group["use_fallback"], group["initial_lr"]) == (True, lr)
    assert norm["weight_decay"] == 0


def test_a_reloaded_state_of_muon_goes_on_alike():
    torch.manual_seed(0)
    model, optim = make_model("concat"), MuonCosine(weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weight = model.llm.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    optimizer = optim.build(model, 10)["optimizer"]
    optimizer.step()
    assert not torch.equal(before, weight)
    copy = make_model("concat")
    copy.load_state_dict(model.state_dict())
    again = optim.build(copy, 10)["optimizer"]
    again.load_state_dict(copy_of(optimizer.state_dict()))
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    again.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))


def test_adamw_trains_every_parameter_once():
    model = make_model("modality_adaptive")
    optimizer = AdamWCosine().build(model, 10)["optimizer"]
    assert set(groups_by_parameter(optimizer)) == {id(p) for p in model.parameters() if p.requires_grad}
