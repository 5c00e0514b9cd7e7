"""Batch norms of several processes: torch's, on GPUs, which wait for each other in every step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import SHAPE_COUNTS, SMALL_DATA, VOCAB, model_node, policy
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.model.multimodal import build_model
from owlfuse.parallel import sharding
from owlfuse.training import module, train

RESNET = {
    "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
    "name": "resnet10t",
    "image_size": 32,
    "kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8},
    "norm": "batch",
}


def resnet_model(kind="Full"):
    nodes = model_node(vision=RESNET, adapter={"vision": policy(kind)})
    return build_model(nodes, VOCAB)[0]


def test_cpu_processes_that_train_batch_norms_are_refused_before_a_weight_is_made(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_shapes("data/shapes", **SHAPE_COUNTS)
    overrides = [*SMALL_DATA, "experiment=shapes_owl1"]
    several = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    with pytest.raises(ConfigError, match=r"model\.vision: batch norms are trained.* GPUs alone"):
        train.run(compose([*overrides, *several]))


def test_gpus_share_the_statistics_of_all_norms_that_are_trained(monkeypatch):
    group = object()
    monkeypatch.setattr(sharding, "data_group", lambda trainer: group)
    trained, frozen = resnet_model(), resnet_model("Frozen")
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    for model in (trained, frozen):
        sharding.synchronize_norms(model, None)
    assert isinstance(trained.vision.norm, nn.SyncBatchNorm)
    kinds = {type(m) for m in trained.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert all(
        m.process_group is group for m in trained.modules() if isinstance(m, nn.SyncBatchNorm)
    )
    after = trained.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in frozen.modules())


@pytest.mark.parametrize("without_images", [0.0, 1.0])
def test_every_rank_keeps_its_statistics_in_a_step_in_which_one_has_no_picture(
    monkeypatch, without_images
):
    """A rank whose norms wait for those of another, which are not used there, waits for ever."""
    training = module.MultimodalModule({}, None, VOCAB)
    training.model = resnet_model()
    training.norms_are_shared = True
    training.trainer = SimpleNamespace()
    monkeypatch.setattr(
        module, "all_gather_rows", lambda trainer, row: torch.stack([row, row + without_images])
    )
    with training.norms_of(SimpleNamespace(has_images=True)):
        assert training.model.vision.norm.training == (not without_images)
    assert training.model.vision.norm.training
