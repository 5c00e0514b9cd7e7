"""The check at the first steps of a run, by real fits of a tiny model whose training is made
wrong in one place."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader

from helpers import (
    FROZEN,
    ROWS,
    VOCAB,
    make_batch,
    model_node,
    policy,
)
from owlfuse.model.loss import token_loss
from owlfuse.model.multimodal import build_model
from owlfuse.training.first_steps import FirstStepsCheck, Watched, checksums, watched_tensors
from owlfuse.training.optim import AdamWCosine

TEXT = [[31, 32, 33, 34], [41, 42]]


class Plain(lightning.LightningModule):
    """The model's loss, and something that goes wrong after each step."""

    def __init__(self, fusion="modality_adaptive", adapter=None, wrong=None, **optim):
        super().__init__()
        self.optim, self.wrong = AdamWCosine(**{"lr": 1e-2, **optim}), wrong
        self.model = build_model(model_node(fusion, adapter=adapter), VOCAB)[0]

    def training_step(self, batch, batch_idx):
        return token_loss(self.model(batch), batch.labels)[0]

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        if self.wrong:
            self.wrong(self.model)

    def configure_optimizers(self):
        return self.optim.build(self.model, 100)


def fit(module, steps=4, rows=ROWS, accumulate=1, check=None):
    batch = make_batch(rows, module.model.fusion.tokens_per_image)
    data = DataLoader([batch] * steps * accumulate, batch_size=None)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    check = check or FirstStepsCheck()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[check],
        barebones=False,
        **options,
    )
    trainer.fit(module, data)
    return check


@pytest.mark.parametrize(
    "fusion", ["concat", "modality_adaptive", "hyperattention-adaptive", "hyperattention-fused"]
)
@pytest.mark.parametrize("trains", ["Full", "LoRA"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.fast_cases(6)
def test_a_run_that_is_right_passes_with_each_policy(fusion, trains, accumulate):
    adapter = {"vision": policy("LastN", n=1), "connector": policy("Frozen"), "llm": policy(trains)}
    assert fit(Plain(fusion, adapter), accumulate=accumulate).pending == set()


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warm_up_from_a_learning_rate_of_0_is_no_alarm(warmup):
    check = fit(Plain(warmup_steps=warmup), steps=warmup + 2)
    assert check.pending == set()
    assert check.counted["llm"] == 2


def test_a_part_that_does_not_move_is_named_with_a_parameter():
    """In float32 an update of 1e-12 is lost."""
    module = Plain(part_lr={"connector": 1e-12}, weight_decay=0.0)
    with torch.no_grad():
        for parameter in module.model.connector.parameters():
            parameter.fill_(1.0)
    with pytest.raises(
        RuntimeError,
        match=(
            "part connector is meant to train, and 3 steps have not moved it, proj.weight for one"
        ),
    ):
        fit(module, check=FirstStepsCheck(patience=3))


def test_a_part_that_stands_still_at_first_has_until_patience():
    module = Plain(warmup_steps=20_000_000, lr=1.0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.fill_(1.0)
    check = fit(module, steps=3)
    assert "vision" in check.pending


@pytest.mark.parametrize("part", ["vision", "connector", "fusion", "llm"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_frozen_parameter_that_changes_is_named(part, steps):
    def wrong(model):
        last = list(model.part(part).parameters.values())[-1]
        last.view(-1)[-1] += 1e-6 + last.view(-1)[-1].abs() * 1e-6

    trained = "connector" if part == "llm" else "llm"
    with pytest.raises(
        RuntimeError, match=f"part {part}: .* is frozen, and the first steps have changed it"
    ):
        fit(Plain(adapter={**FROZEN, trained: policy("Full")}, wrong=wrong), steps=steps)


def test_statistics_of_a_frozen_backbone_that_change_are_named():
    def wrong(model):
        model.vision.norm.running_mean += 1.0

    module = Plain("concat", {"vision": policy("Frozen")}, wrong)
    nodes = model_node("concat", adapter={"vision": policy("Frozen")})
    nodes["vision"] = {**nodes["vision"], "norm": True}
    module.model = build_model(nodes, VOCAB)[0]
    with pytest.raises(RuntimeError, match="part vision: norm.running_mean is frozen"):
        fit(module)


def test_a_frozen_backbone_keeps_the_statistics_of_its_batch_norms_through_a_fit():
    nodes = model_node("concat", adapter={"vision": policy("Frozen")})
    nodes["vision"] = {**nodes["vision"], "norm": True}
    module = Plain("concat")
    module.model = build_model(nodes, VOCAB)[0]
    fit(module)
    assert module.model.vision.norm.running_mean.eq(0).all()


def test_a_parameter_that_the_optimizer_lacks_is_named():
    module = Plain()
    groups = module.optim.groups
    module.optim.groups = lambda model: [
        group for group in groups(model) if not group["name"].startswith("fusion")
    ]
    with pytest.raises(
        RuntimeError, match="part fusion: .* is meant to train, and the optimizer lacks it"
    ):
        fit(module)


def test_steps_without_a_picture_say_nothing_of_the_parts_that_see_pictures():
    check = fit(Plain(weight_decay=0.0), rows=TEXT, steps=4, check=FirstStepsCheck(patience=3))
    assert check.pending == {"vision", "connector", "fusion"}
    assert check.frozen_checked


def test_rows_of_new_tokens_on_another_rank_are_no_alarm(monkeypatch):
    adapter = {"llm": policy("Frozen")}
    model = build_model(model_node(adapter=adapter), VOCAB, None, {"<new>": VOCAB - 1})[0]
    table = model.llm.get_input_embeddings().weight
    watched = watched_tensors(model).values()
    assert any(tensor is table for tensor in watched)
    monkeypatch.setattr("owlfuse.training.first_steps.local", lambda t: t[:-1] if t is table else t)
    assert not any(tensor is table for tensor in watched_tensors(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_changes_with_the_last_bit_of_any_number(dtype, monkeypatch):
    monkeypatch.setattr("owlfuse.training.first_steps.CHUNK", 7)
    model = build_model(model_node(), VOCAB)[0].to(dtype)
    watched = watched_tensors(model)
    before = checksums(watched)
    assert checksums(watched) == before
    for key, tensor in watched.items():
        with torch.no_grad():
            tensor.view(-1)[-1] = torch.nextafter(
                tensor.view(-1)[-1], torch.tensor(9.0, dtype=dtype)
            )
        assert checksums({key: tensor})[key] != before[key]


def test_of_a_sharded_parameter_its_own_shard_is_looked_at(tmp_path):
    """As FSDP2 and tensor parallelism have them: a DTensor, of which a rank holds its shard."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.nn.Parameter(torch.randn(6, 4))
        sharded = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
        key = Watched("llm", "weight", True)
        before = checksums({key: sharded})
        assert before == checksums({key: whole})
        with torch.no_grad():
            sharded.to_local()[5, 3] += 1e-3
        assert checksums({key: sharded}) != before
    finally:
        distributed.destroy_process_group()


class Unchecked(AdamWCosine):
    """An optimizer of a user's, with groups of its own."""

    def groups(self, model):
        return [
            {"params": [p], "lr": self.rate(name), "name": name} for name, p in trained_of(model)
        ]

    def rate(self, name):
        return 0.0 if name.startswith(self.still) else 1e-2


def trained_of(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("still", "part"), [("connector", "connector"), ("vision", "vision")])
def test_a_part_whose_rate_is_0_is_named_before_the_first_step(still, part):
    module = Plain()
    module.optim = Unchecked()
    module.optim.still = still
    with pytest.raises(RuntimeError, match=f"part {part} is meant to train, and its learning rate"):
        fit(module)


def test_a_run_that_ends_before_its_rate_leaves_0_is_told(caplog):
    fit(Plain(warmup_steps=5), steps=1)
    assert (
        "no step had a learning rate above 0 for connector, fusion, llm, vision; see "
        "optim.warmup_steps"
    ) in caplog.text
