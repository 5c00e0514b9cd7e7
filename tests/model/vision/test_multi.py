"""Several timm backbones as one: the same features as each by itself gives for its own pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from helpers import ROWS, VOCAB, make_batch, make_model, model_node, policy
from owlfuse.artifacts.hf.configuration import without_weights
from owlfuse.artifacts.identity import weights_identity
from owlfuse.config.trust import check_backbone, check_names
from owlfuse.core.errors import DataError
from owlfuse.model.multimodal import build_model
from owlfuse.model.vision.backbone import TimmBackbone
from owlfuse.model.vision.multi import MultiBackbone

TARGET = "owlfuse.model.vision.backbone.TimmBackbone"
SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}


def node(name, **arguments):
    kwargs = {**SMALL, **arguments.pop("kwargs", {})}
    return {"_target_": TARGET, "name": name, "kwargs": kwargs, **arguments}


# means and deviations of 0.5, those of ImageNet, and those of CLIP
VIT = node("vit_tiny_patch16_224", output="penultimate")
DEIT = node("deit_tiny_patch16_224", kwargs={"embed_dim": 12})
FINER = node("vit_base_patch32_clip_224", kwargs={"patch_size": 8})
RESNET = {"_target_": TARGET, "name": "test_resnet", "output": "penultimate"}
MULTI = {
    "_target_": "owlfuse.model.vision.multi.MultiBackbone",
    "backbones": {"first": VIT, "second": DEIT, "finer": FINER},
    "image_size": 32,
}


def alone(described, model, name, image_size=32):
    """The backbone of a node by itself, with the weights that it has in the model."""
    arguments = {key: value for key, value in described.items() if key != "_target_"}
    arguments.setdefault("image_size", image_size)
    single = TimmBackbone(**arguments, class_token=False).eval()
    single.load_state_dict(model.backbones[name].state_dict())
    return single


def picture():
    numbers = np.random.default_rng(0).integers(0, 256, (40, 50, 3))
    return Image.fromarray(numbers.astype(np.uint8))


@torch.no_grad()
def test_each_backbone_sees_the_picture_as_it_would_alone_and_channels_are_side_by_side():
    model = MultiBackbone({"first": VIT, "second": DEIT}, image_size=32).eval()
    expected = []
    for name, described in (("first", VIT), ("second", DEIT)):
        single = alone(described, model, name)
        expected.append(single(single.preprocessing(picture())[None]))
    features = model(model.preprocessing(picture())[None])
    assert (model.width, model.patches, model.grid) == (28, 4, (2, 2))
    torch.testing.assert_close(features, torch.cat(expected, dim=2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_finer_grid_is_brought_to_the_first_ones():
    model = MultiBackbone({"first": VIT, "finer": FINER}, image_size=32).eval()
    single = alone(FINER, model, "finer")
    finer = single(single.preprocessing(picture())[None])[0].unflatten(0, (4, 4))
    features = model(model.preprocessing(picture())[None])[0, :, 16:].unflatten(0, (2, 2))
    for row in range(2):
        for column in range(2):
            # halved bilinearly: the mean of the four in the middle of the cell
            cell = finer[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = cell.mean((0, 1))
            torch.testing.assert_close(features[row, column], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_a_size_for_all_pictures_come_at_the_largest_and_others_are_averaged_down():
    large, small = {**VIT, "image_size": 64}, {**DEIT, "image_size": 32}
    model = MultiBackbone({"small": small, "large": large}).eval()
    assert model.preprocessing.size == (64, 64)
    assert model.preprocessing.mean == model.backbones["small"].preprocessing.mean
    assert model.grid == (2, 2)
    # a picture of few colours: averaged by PIL or by torch it is the same
    colours = Image.fromarray(np.full((64, 64, 3), (200, 30, 90), np.uint8))
    single = alone(small, model, "small")
    expected = single(single.preprocessing(colours)[None])
    features = model(model.preprocessing(colours)[None])
    torch.testing.assert_close(features[..., :12], expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_it_learns_in_every_part_and_at_another_size():
    model = make_model(vision=MULTI).train()
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    model(batch).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval().set_image_size(64)
    assert model.vision.grid == (4, 4)
    assert model.nodes["vision"]["image_size"] == 64
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    batch.pixel_values = F.interpolate(batch.pixel_values, scale_factor=2)
    fresh = make_model(vision=model.nodes["vision"])
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(batch), fresh(batch))


def test_last_n_trains_the_last_blocks_of_each():
    nodes = model_node(vision=MULTI, adapter={"vision": policy("LastN", n=1)})
    model, _ = build_model(nodes, VOCAB)
    trained = {name for name, p in model.vision.named_parameters() if p.requires_grad}
    backbones = {name.split(".")[1] for name in trained}
    assert backbones == {"first", "second", "finer"}
    # of the first, whose last block is taken out, the last but one is the last
    assert any(name.startswith("backbones.first.body.blocks.1.") for name in trained)
    assert any(name.startswith("backbones.second.body.blocks.2.") for name in trained)
    assert not any(".blocks.0." in name for name in trained)
    parameters = [id(p) for block in model.vision.blocks() for p in block]
    assert sorted(parameters) == sorted(id(p) for p in model.vision.parameters())


def test_units_and_compiled_blocks_are_those_of_all_and_options_reach_each():
    model = MultiBackbone(MULTI["backbones"], image_size=32)
    blocks = []
    for name in ("first", "second", "finer"):
        blocks += list(model.backbones[name].body.blocks)
    assert [id(unit) for unit in model.sharding_units()] == [id(block) for block in blocks]
    assert [id(unit) for unit in model.compiled_blocks()] == [id(block) for block in blocks]
    model.set_compute_option("chunk", 1)
    assert {backbone.chunk for backbone in model.backbones.values()} == {1}
    model.set_compute_option("gradient_checkpointing", True)
    assert all(backbone.body.grad_checkpointing for backbone in model.backbones.values())


def test_batch_norms_of_each_leave_a_blank_image_out():
    model = MultiBackbone({"a": RESNET, "b": {**RESNET, "norm": True}}, image_size=64).train()
    pixels = torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with model.statistics_kept():
        model(pixels)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model(pixels)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    model.set_compute_option("chunk", 1)
    with pytest.raises(ValueError, match=r"backbones\.a: chunk is 1, and batch norms are trained"):
        model.check_training(sharded=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbones": {"only": VIT}}, "backbones has 1, expected two or more"),
        (
            {"align": "refuse"},
            r"backbones\.finer: its grid is 4 x 4 patches, and that of first 2 x",
        ),
        ({"image_size": 40}, r"backbones\.first: image_size is 40"),
        ({"image_size": 0}, r"backbones\.first: image_size is 0, expected pixels"),
        ({"backbones": {"a": VIT, "b": "vit"}}, r"backbones\.b: it is 'vit', expected a mapping"),
        ({"backbones": {"a": VIT, "b": {**VIT, "chunk": 2}}}, r"backbones\.b: chunk is the same"),
        ({"backbones": {"a": VIT, "b": {**VIT, "_target_": "torch.nn.Linear"}}}, "b: _target_ is"),
        ({"backbones": {"a": VIT, "b": {**VIT, "levels": [7]}}}, r"backbones\.b: levels are"),
        ({"backbones": {"a": RESNET, "b": VIT}, "gradient_checkpointing": True}, r"a: gradient_ch"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_weight_is_made(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        build_model(model_node(vision={**MULTI, **arguments}), VOCAB)
    assert "\n" not in str(error.value)


def test_files_of_models_are_checked_for_each(tmp_path):
    nodes = {"model": {"vision": MULTI}}
    check_names(nodes, tmp_path / "config.json")
    inside = {**VIT, "kwargs": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}}
    hostile = {**MULTI, "backbones": {"a": VIT, "b": inside}}
    with pytest.raises(DataError, match=r"vision\.backbones\.b\.kwargs\.pretrained_cfg_overlay"):
        check_backbone(hostile, tmp_path / "config.json")
    fetched = {**MULTI, "backbones": {"a": VIT, "b": {**VIT, "name": "hf-hub:me/model"}}}
    with pytest.raises(DataError, match=r"vision\.backbones\.b\.name is hf-hub:me/model"):
        check_backbone(fetched, tmp_path / "config.json", hub=False)
    other = {**MULTI, "backbones": {"a": VIT, "b": {**VIT, "_target_": "os.system"}}}
    with pytest.raises(DataError, match=r"model\.vision\.backbones\.b\._target_"):
        check_names({"model": {"vision": other}}, tmp_path / "config.json")


def test_weights_of_each_are_known_to_a_run_and_asked_for_by_no_export(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"some weights")
    weighted = {**VIT, "weights": str(tmp_path / "w.pth")}
    vision = {**MULTI, "backbones": {"a": weighted, "b": {**DEIT, "pretrained": True}}}
    identity = weights_identity({"model": {"vision": vision, "llm": {}}})
    assert "model.vision.backbones.a.weights" in identity
    (tmp_path / "w.pth").write_bytes(b"other weights")
    assert weights_identity({"model": {"vision": vision, "llm": {}}}) != identity
    stripped = without_weights(vision)["backbones"]
    assert stripped["a"] == VIT
    assert stripped["b"] == {**DEIT, "pretrained": False}
