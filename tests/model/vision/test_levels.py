"""Features of several blocks: joined by channel or separate, against what timm's own blocks give."""

import pytest
import timm
import torch

from helpers import VIT, VOCAB, make_model, model_node
from owlfuse.model.multimodal import build_model
from owlfuse.model.vision.backbone import TimmBackbone

SMALL = {"depth": 5, "embed_dim": 16, "num_heads": 2}
# name, side in pixels, tokens before the patches
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 48, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", 28, 5),
    "siglip": ("vit_base_patch16_siglip_224", 32, 0),
    "eva": ("eva02_tiny_patch14_224", 28, 1),
}
family = pytest.mark.parametrize("family", FAMILIES)
output = pytest.mark.parametrize("output", ["last", "penultimate"])


def backbone(family, **arguments):
    name, size, _ = FAMILIES[family]
    return TimmBackbone(name, image_size=size, kwargs=SMALL, **arguments)


def block_outputs(family, model, pixels):
    """What each block of timm's own model with the backbone's weights gives, and the features at
    its end."""
    name, size, _ = FAMILIES[family]
    twin = timm.create_model(name, num_classes=0, **SMALL).eval()
    twin.set_input_size(img_size=(size, size))
    twin.load_state_dict(model.body.state_dict(), strict=False)
    outputs = []
    for block in twin.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    return outputs, twin.forward_features(pixels)


@family
@output
@torch.no_grad()
@pytest.mark.fast_cases(3)
def test_channels_are_those_of_the_output_and_then_of_each_block_from_shallow_to_deep(
    family, output
):
    model = backbone(family, output=output, levels=[-4, 0, 2]).eval()
    assert model.width == 64
    assert model.extra_levels == 0
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = torch.randn(2, 3, *model.preprocessing.size)
    blocks, last = block_outputs(family, model, pixels)
    first = last if output == "last" else blocks[3]
    expected = torch.cat([first, blocks[0], blocks[1], blocks[2]], dim=2)
    torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)


@family
@torch.no_grad()
@pytest.mark.fast_cases(2)
def test_separate_levels_are_the_same_features_and_index_0_is_the_output(family):
    joined = backbone(family, levels=[1, 3], class_token=False).eval()
    model = backbone(family, levels=[1, 3], class_token=False, join="separate").eval()
    plain = backbone(family, class_token=False).eval()
    model.load_state_dict(joined.state_dict())
    plain.load_state_dict(joined.state_dict())
    pixels = torch.randn(2, 3, *model.preprocessing.size)
    features = model(pixels)
    assert (model.extra_levels, model.width) == (2, 16)
    assert features.shape == (2, 3, model.patches, 16)
    torch.testing.assert_close(features[:, 0], plain(pixels), rtol=1e-5, atol=1e-5)
    by_channel = features.transpose(1, 2).flatten(2)
    torch.testing.assert_close(by_channel, joined(pixels), rtol=0, atol=0)


@output
def test_every_parameter_left_has_a_gradient_and_shallow_levels_alone_cut_nothing(output):
    model = backbone("vit", output=output, levels=[0], join="separate")
    model(torch.randn(2, 3, *model.preprocessing.size)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert len(model.body.blocks) == 5


def test_norm_and_positions_are_those_of_each_level():
    model = backbone("vit", levels=[0, 2], join="separate", norm=True, positions=True)
    features = model(torch.randn(6, 3, *model.preprocessing.size)) - model.positions
    mean = features.mean((0, 2))
    deviation = features.std((0, 2), unbiased=False)
    torch.testing.assert_close(mean, torch.zeros(3, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(deviation, torch.ones(3, 16), rtol=0, atol=1e-2)


@torch.no_grad()
def test_chunks_give_the_same_levels():
    model = backbone("vit", levels=[1], join="separate").eval()
    pixels = torch.randn(5, 3, *model.preprocessing.size)
    whole = model(pixels)
    model.chunk = 2
    torch.testing.assert_close(model(pixels), whole, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_at_another_size_and_on_the_meta_device_the_levels_are_the_same_blocks():
    model = backbone("vit", levels=[-3]).eval()
    model.set_image_size(64)
    pixels = torch.randn(1, 3, 64, 64)
    assert model(pixels).shape == (1, 17, 32)
    with torch.device("meta"):
        meta = backbone("vit", levels=[-3])
    assert (meta.width, meta.patches, meta.levels) == (32, 10, model.levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": [4]}, "levels are .4., .* blocks 0 to 4, of which output: last gives 4"),
        ({"levels": [-1]}, "output: last gives 4; choose numbers below that, or from -5 to -2"),
        ({"levels": [3], "output": "penultimate"}, "output: penultimate gives 3"),
        ({"levels": [-6]}, "choose numbers below that"),
        ({"levels": [1, -4]}, "which name a block twice"),
    ],
)
def test_a_level_that_is_not_there_is_refused_in_one_line(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        backbone("vit", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["convnext_atto", "test_resnet"])
def test_stages_of_other_grids_are_refused(name):
    with torch.device("meta"), pytest.raises(ValueError, match="levels need the same grid"):
        TimmBackbone(name, image_size=64, levels=[1])


def test_a_model_with_levels_by_channel_is_one_like_any_other():
    vision = {**VIT, "levels": [0, -2]}
    model = make_model(vision=vision)
    assert model.connector.proj.in_features == 48
    with torch.device("meta"):
        build_model(model_node(vision=vision), VOCAB)


def test_a_size_that_the_model_does_not_take_is_one_line():
    with pytest.raises(ValueError, match="cait_xxs24_224") as error:
        TimmBackbone("cait_xxs24_224", image_size=64, levels=[0])
    assert "\n" not in str(error.value)
