"""Any timm model as a backbone, each family held to timm's own forward."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.layers import DropPath
from torch import nn

from helpers import make_model, policy
from owlfuse.model.vision.backbone import TimmBackbone
from owlfuse.model.vision.body import create_body

BACKBONE = "owlfuse.model.vision.backbone.TimmBackbone"
VIT = {"depth": 3, "embed_dim": 16, "num_heads": 2}
# name, its size and keyword arguments: the family's structure at its smallest
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 32, VIT),
    "vit-registers": ("vit_small_patch14_reg4_dinov2", 28, VIT),
    "vit-siglip": ("vit_base_patch16_siglip_224", 32, VIT),
    "vit-avg-pool": ("test_vit3", None, {}),
    "convnext": ("convnext_atto", 64, {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 16]}),
    "resnet": ("test_resnet", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 1, 2)},
    ),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "regnet": ("regnetx_002", 32, {}),
    "eva": ("eva02_tiny_patch14_224", 28, VIT),
}
SMALL_VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "kwargs": VIT}

family = pytest.mark.parametrize("family", FAMILIES)
output = pytest.mark.parametrize("output", ["last", "penultimate"])


def backbone(family, **arguments):
    name, size, kwargs = FAMILIES[family]
    return TimmBackbone(name, image_size=size, kwargs=kwargs, **arguments)


def pixels_for(model, count=2):
    return torch.randn(count, 3, *model.preprocessing.size)


def timm_twin(family, model):
    """A timm model of the family with the backbone's weights, made by timm alone, and nothing
    taken out of it."""
    name, size, kwargs = FAMILIES[family]
    twin = timm.create_model(name, num_classes=0, **kwargs)
    if size and hasattr(twin, "set_input_size"):
        twin.set_input_size(img_size=(size, size))
    missing, unexpected = twin.load_state_dict(model.body.state_dict(), strict=False)
    assert not unexpected
    return twin.eval(), set(missing)


def sequence(features, channels_last):
    """(N, P, Dv) of a map, one patch after the other."""
    if features.ndim == 3:
        return features
    features = features if channels_last else features.permute(0, 2, 3, 1)
    rows = [features[:, i, j] for i in range(features.shape[1]) for j in range(features.shape[2])]
    return torch.stack(rows, dim=1)


@family
@output
@pytest.mark.fast_cases(7)
def test_width_patches_and_grid_are_those_of_the_features(family, output):
    model = backbone(family, output=output).eval()
    features = model(pixels_for(model))
    assert features.shape == (2, model.patches, model.width)
    assert model.grid[0] * model.grid[1] == model.patches - model.prefix_tokens
    if family not in ("vit-siglip", "vit-avg-pool"):
        assert (model.prefix_tokens > 0) == (family in ("vit", "vit-registers", "eva"))


@family
@output
@pytest.mark.fast_cases(4)
def test_every_parameter_has_a_gradient(family, output):
    model = backbone(family, output=output)
    model(pixels_for(model)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@family
@torch.no_grad()
def test_last_is_what_timms_forward_features_gives(family):
    model = backbone(family).eval()
    twin, _ = timm_twin(family, model)
    pixels = pixels_for(model)
    expected = sequence(twin.forward_features(pixels), channels_last=family == "swin")
    torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)


@family
@torch.no_grad()
def test_penultimate_is_timms_last_intermediate_but_one_and_not_the_last(family):
    model = backbone(family, output="penultimate").eval()
    # layer scales start near zero, and a block would change nothing
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    twin, missing = timm_twin(family, model)
    assert missing  # the last block was taken out
    for name, parameter in twin.named_parameters():
        if name in missing:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = pixels_for(model)
    _, intermediates = twin.forward_intermediates(pixels, norm=False)
    expected = sequence(intermediates[-2], channels_last=False)
    got = model(pixels)[:, model.prefix_tokens :]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    last = sequence(intermediates[-1], channels_last=False)
    assert last.shape != got.shape or (last - got).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["vit", "vit-registers", "vit-siglip", "eva"])
@output
@torch.no_grad()
def test_without_class_token_the_prefix_is_dropped_and_the_patches_stay(family, output):
    model = backbone(family, output=output).eval()
    without = backbone(family, output=output, class_token=False).eval()
    without.load_state_dict(model.state_dict())
    prefix = {"vit": 1, "vit-registers": 5, "vit-siglip": 0, "eva": 1}[family]
    assert model.prefix_tokens == prefix
    assert without.patches == model.patches - prefix == model.grid[0] * model.grid[1]
    pixels = pixels_for(model)
    assert torch.equal(without(pixels), model(pixels)[:, prefix:])


@torch.no_grad()
def test_penultimate_keeps_the_class_token_first():
    model = backbone("vit", output="penultimate").eval()
    pixels = pixels_for(model)
    hidden = {}
    model.body.blocks[-2].register_forward_hook(lambda module, args, out: hidden.update(out=out))
    features = model(pixels)
    torch.testing.assert_close(features, hidden["out"], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "vit-siglip", "convnext", "swin"])
def test_patches_are_in_reading_order(family):
    """The first patch answers most to a change in the top left corner, and the last to one in
    the bottom right."""
    model = backbone(family, class_token=False).eval()
    height, width = model.preprocessing.size
    pixels = torch.randn(1, 3, height, width, requires_grad=True)
    for patch, corner in (
        (0, (0, 0)),
        (model.grid[1] - 1, (0, 1)),
        (model.patches - model.grid[1], (1, 0)),
    ):
        gradient = (
            torch.autograd.grad(model(pixels)[0, patch].square().sum(), pixels)[0]
            .abs()
            .sum(dim=(0, 1))
        )
        quarters = gradient.unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum(dim=(1, 3))
        assert divmod(quarters.argmax().item(), 2) == corner


@family
@pytest.mark.fast_cases(4)
def test_it_is_made_and_measured_on_the_meta_device(family):
    real = backbone(family)
    with torch.device("meta"):
        model = backbone(family)
    assert all(tensor.is_meta for tensor in model.parameters())
    assert (model.patches, model.width, model.grid) == (real.patches, real.width, real.grid)
    assert model.preprocessing == real.preprocessing
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in real.named_parameters()]


def test_on_the_meta_device_no_pretrained_weights_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("owlfuse.model.vision.body.check_hub_has", lambda *args: None)
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda *args, **kwargs: asked.append(args)
    )
    with torch.device("meta"):
        TimmBackbone("test_vit", pretrained=True)
    assert not asked
    TimmBackbone("test_vit", pretrained=True)
    assert len(asked) == 1


@pytest.mark.parametrize("family", ["vit", "vit-siglip", "vit-avg-pool", "eva", "convnext"])
@output
@torch.no_grad()
@pytest.mark.fast_cases(3)
def test_pretrained_weights_are_loaded_whatever_head_they_came_with(family, output, tmp_path):
    name, size, kwargs = FAMILIES[family]
    # with the pooling and the classifier that timm's own weights have
    source = timm.create_model(name, **kwargs)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "hf_hub_id": None, "url": ""}
    kwargs = {**kwargs, "pretrained_cfg_overlay": overlay}
    model = TimmBackbone(name, pretrained=True, output=output, image_size=size, kwargs=kwargs)
    weights = source.state_dict()
    loaded = [
        n for n, p in model.body.named_parameters() if n in weights and torch.equal(p, weights[n])
    ]
    differ = {n for n, _ in model.body.named_parameters()} - set(loaded)
    # position tables are interpolated to the size
    assert not {n for n in differ if "pos_embed" not in n}


def test_measuring_leaves_mode_and_batch_statistics_as_they_were():
    model = backbone("resnet")
    assert model.training
    assert all(module.training for module in model.modules())
    fresh = timm.create_model("test_resnet")
    assert torch.equal(model.body.bn1.running_mean, fresh.bn1.running_mean)
    assert model.body.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "regnet"])
def test_a_blank_image_does_not_move_batch_statistics(family):
    model = backbone(family).train()
    pixels = pixels_for(model)
    model(pixels)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with model.statistics_kept():
        inside = model(pixels * 0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    torch.testing.assert_close(model.eval()(pixels * 0), inside, rtol=1e-5, atol=1e-5)
    model.train()(pixels)
    assert not all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_statistics_kept_leaves_frozen_norms_frozen():
    model = backbone("resnet").train()
    model.body.bn1.eval()
    with model.statistics_kept():
        pass
    assert not model.body.bn1.training
    assert model.body.layer1[0].bn1.training


# Preprocessing


def picture(height, width):
    """A picture with structure at every scale, so that a wrong interpolation shows."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack(
        [128 + 100 * np.sin(x / 5), 128 + 100 * np.cos(y / 7), (x * 3 + y * 5) % 256], axis=-1
    )
    return Image.fromarray(
        (0.7 * smooth + 0.3 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8)
    )


@pytest.mark.parametrize("family", ["vit", "vit-siglip", "convnext", "swin", "efficientnet"])
@pytest.mark.parametrize("size", [(50, 90), (20, 17)], ids=["larger", "smaller"])
def test_preprocessing_is_timms_mean_std_size_and_interpolation_over_the_whole_picture(
    family, size
):
    name, image_size, kwargs = FAMILIES[family]
    model = backbone(family)
    data = resolve_model_data_config(timm.create_model(name, **kwargs))
    modes = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    raw = picture(*size)
    resized = np.asarray(
        raw.resize((image_size, image_size), modes[data["interpolation"]]), dtype=np.float64
    )
    expected = (resized / 255 - np.array(data["mean"])) / np.array(data["std"])
    got = model.preprocessing(raw)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_without_an_image_size_it_is_the_models_own():
    model = TimmBackbone("test_vit")
    assert model.preprocessing.size == (160, 160)
    assert model.preprocessing(picture(30, 40)).shape == (3, 160, 160)


def test_interpolation_is_read_from_timm_and_not_one_for_all():
    assert (
        TimmBackbone("mobilenetv3_small_050", image_size=32).preprocessing.interpolation
        == "bicubic"
    )
    assert TimmBackbone("test_vit", image_size=32).preprocessing.interpolation != ""
    found = {backbone(name).preprocessing.mean for name in ("vit", "convnext")}
    assert len(found) == 2


# Blocks and errors


@torch.no_grad()
def test_blocks_hold_every_parameter_once_in_order():
    model = TimmBackbone(**SMALL_VIT)
    blocks = model.blocks()
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in block] for block in blocks]
    assert sorted(name for block in found for name in block) == sorted(names.values())
    for depth in range(3):
        assert any(
            name.startswith(f"body.blocks.{depth}.") for name in found[depth + len(found) - 3]
        )


def test_a_model_that_does_not_say_what_a_layer_is_trains_as_a_whole():
    vision = {"_target_": BACKBONE, "name": "poolformer_s12", "image_size": 64}
    assert make_model(vision=vision).vision.blocks() == []
    with pytest.raises(ValueError, match="has 0 layers to choose from"):
        make_model(vision=vision, adapter={"vision": policy("LastN", n=1)})


@pytest.mark.parametrize("output", ["last", "penultimate"])
def test_the_patches_of_a_naflex_vit_are_a_grid(output):
    vit = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    name = "naflexvit_base_patch16_gap"
    with torch.device("meta"):
        model = TimmBackbone(name, output=output, image_size=32, kwargs=vit)
    assert model.grid == (2, 2)


@pytest.mark.parametrize("name", ["vit_gargantuan", "resnet5000"])
def test_an_unknown_name_is_an_error_that_gives_it(name):
    with pytest.raises(ValueError, match=name):
        TimmBackbone(name)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"timm has .*vit_"):
        TimmBackbone("vit_gargantuan")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet", "convnext_atto"])
def test_wrong_kwargs_are_an_error_that_names_them(name):
    with pytest.raises(ValueError, match="wibble"):
        TimmBackbone(name, image_size=32, kwargs={"wibble": 3})


def test_heads_that_do_not_divide_the_width_are_a_value_error():
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        TimmBackbone(
            "vit_tiny_patch16_224",
            image_size=32,
            kwargs={"embed_dim": 16, "num_heads": 3, "depth": 1},
        )


@pytest.mark.parametrize(
    ("norm", "over"),
    # (pictures, places); true is of runs of before
    [("instance", (1,)), ("batch", (0, 1)), (True, (0, 1))],
)
def test_norm_brings_each_feature_to_mean_0_and_variance_1(norm, over):
    plain = backbone("resnet", positions=True)
    normed = backbone("resnet", positions=True, norm=norm)
    normed.body.load_state_dict(plain.body.state_dict())
    pixels = pixels_for(plain, 8)
    raw, features = plain(pixels) - plain.positions, normed(pixels) - normed.positions
    variance = raw.var(over, unbiased=False, keepdim=True)
    wanted = (raw - raw.mean(over, keepdim=True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)


def test_an_instance_norm_of_one_place_is_refused_when_built_and_at_another_size():
    one_place = "instance is over the places of a picture, and the backbone gives one at 32 x 32"
    with pytest.raises(ValueError, match=one_place):
        TimmBackbone("resnet10t", image_size=32, norm="instance")
    model = TimmBackbone("resnet10t", image_size=64, norm="instance")
    with pytest.raises(ValueError, match=one_place):
        model.set_image_size(32)
    with pytest.raises(ValueError, match="norm is 'layer', expected one of instance, batch"):
        TimmBackbone("resnet10t", image_size=64, norm="layer")


def test_norm_is_trained_with_the_last_block_and_stays_with_the_statistics_of_a_batch_without_images():
    model = backbone("resnet", norm=True)
    assert {id(p) for p in model.norm.parameters()} < {id(p) for p in model.blocks()[-1]}
    before = model.norm.running_mean.clone()
    with model.statistics_kept():
        model(pixels_for(model))
    assert torch.equal(model.norm.running_mean, before)
    model(pixels_for(model))
    assert not torch.equal(model.norm.running_mean, before)


@family
@pytest.mark.parametrize("chunk", [1, 2, 5])
@torch.no_grad()
@pytest.mark.fast_cases(9)
def test_chunks_give_the_features_of_all_images_at_once(family, chunk):
    model = backbone(family, norm=True).eval()
    pixels = pixels_for(model, 5)
    whole = model(pixels)
    seen = []
    model.body.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.body.forward_features = lambda x, f=model.body.forward_features: (
        seen.append(len(x)) or f(x)
    )
    model.chunk = chunk
    torch.testing.assert_close(model(pixels), whole, rtol=1e-6, atol=1e-6)
    assert seen == [min(chunk, 5 - start) for start in range(0, 5, chunk)]


@pytest.mark.parametrize("family", ["vit", "convnext", "swin", "eva"])
@pytest.mark.parametrize("norm", [False, True])
def test_chunks_give_the_gradients_of_all_images_at_once_where_there_is_no_batch_norm(family, norm):
    model = backbone(family, norm=norm)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    pixels = pixels_for(model, 5)
    weights = torch.randn(model(pixels).shape)
    found = []
    for chunk in (None, 2):
        model.chunk = chunk
        model.zero_grad()
        (model(pixels) * weights).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1), msg=name
        )


def test_chunks_keep_fewer_activations_for_the_backward_pass():
    def kept(chunk):
        model = TimmBackbone(**SMALL_VIT, chunk=chunk)
        sizes = {}
        pack = lambda t: (  # noqa: E731
            sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            pixels = torch.randn(32, 3, 32, 32)
            model(pixels).sum()
        own = {t.untyped_storage().data_ptr() for t in (pixels, *model.parameters())}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert kept(4) < kept(None) / 10


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "regnet"])
def test_batch_norms_in_training_see_the_whole_batch_and_move_their_statistics_once(family):
    whole, chunked = backbone(family), backbone(family, chunk=2)
    chunked.load_state_dict(whole.state_dict())
    pixels = pixels_for(whole, 6)
    torch.manual_seed(1)
    whole(pixels).sum().backward()
    torch.manual_seed(1)
    chunked(pixels).sum().backward()
    for (name, one), other in zip(whole.state_dict().items(), chunked.state_dict().values()):
        assert torch.equal(one, other), name


def test_a_blank_image_in_chunks_of_one_does_not_move_batch_statistics():
    model = backbone("resnet", chunk=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with model.statistics_kept():
        features = model(pixels_for(model, 1) * 0)
    features.sum().backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_chunks_are_refused_in_training_where_they_would_change_it_or_wait_for_ever():
    model = backbone("resnet", chunk=2).train()
    with pytest.raises(ValueError, match="chunk is 2, and batch norms are trained"):
        model.check_training(sharded=False)
    model.eval().check_training(sharded=False)
    plain = TimmBackbone(**SMALL_VIT, chunk=2).train()
    plain.check_training(sharded=False)
    with pytest.raises(ValueError, match="chunk is 2, and parameters are split over ranks"):
        plain.check_training(sharded=True)
    TimmBackbone(**SMALL_VIT).check_training(sharded=True)


def test_a_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk is 0, expected a number of images of at least 1"):
        TimmBackbone(**SMALL_VIT, chunk=0)


DROPPING = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "patch_drop_rate": 0.5}),
    "eva": ("eva02_tiny_patch14_224", {**VIT, "patch_drop_rate": 0.3}),
    "deit": ("deit_tiny_patch16_224", {**VIT, "patch_drop_rate": 0.25}),
}


@pytest.mark.parametrize("family", DROPPING)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_with_other_tokens_in_training_is_refused(family, device):
    name, kwargs = DROPPING[family]
    state = torch.get_rng_state()
    with (
        torch.device(device),
        pytest.raises(
            ValueError, match=rf"{name} gives \d+ tokens in training and \d+ in evaluation"
        ),
    ):
        TimmBackbone(name, image_size=56 if family == "eva" else 64, kwargs=kwargs)
    if device == "meta":
        assert torch.equal(torch.get_rng_state(), state)


# name, arguments of the model, and how many of its tokens are no patches
PREFIXED = {
    "vit": ("vit_tiny_patch16_224", VIT, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", VIT, 5),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 2),
    "cait": ("cait_xxs24_224", {"depth": 1}, 1),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 1}, 1),
    "volo": ("volo_d1_224", {}, 1),
    "convit": ("convit_tiny", {}, 1),
    "mixer": ("mixer_s16_224", {}, 0),
    "pooled": ("vit_base_patch16_siglip_224", VIT, 0),
}


@pytest.mark.parametrize("family", PREFIXED)
@pytest.mark.fast_cases(1)
def test_without_class_token_exactly_what_is_no_patch_is_dropped(family):
    name, kwargs, prefix = PREFIXED[family]
    with torch.device("meta"):
        whole = TimmBackbone(name, kwargs=kwargs)
        patches = TimmBackbone(name, kwargs=kwargs, class_token=False)
    side = int(patches.patches**0.5)
    assert (side * side, whole.patches - patches.patches) == (patches.patches, prefix)


def test_a_model_that_gives_its_class_token_alone_is_refused():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="pit_ti_224 gives class tokens alone"):
            TimmBackbone("pit_ti_224")
        assert TimmBackbone("pit_ti_224", output="penultimate", class_token=False).grid == (14, 14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "Last"}, "output is 'Last', expected one of last, penultimate"),
        ({"join": "both"}, "join is 'both', expected one of channel, separate"),
        ({"join": "separate"}, "join: separate hands on levels .* set levels"),
        (
            {"kwargs": {"img_size": 96}},
            "kwargs: img_size is 96, and pictures are 224 x 224; set image_size",
        ),
        ({"kwargs": {"in_chans": 1}}, "does not take pictures of 3 channels and 224 x 224"),
        ({"name": "mixer_s16_224", "image_size": 192}, "does not take pictures .* 192 x 192"),
    ],
)
def test_arguments_that_do_not_fit_are_told_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as refusal, torch.device("meta"):
        TimmBackbone(**{"name": "vit_tiny_patch16_224", **arguments})
    assert "\n" not in str(refusal.value)


def test_a_size_of_patches_may_be_one_number():
    with torch.device("meta"):
        model = TimmBackbone("xcit_nano_12_p16_224", image_size=256)
        assert model.patches == 257
        with pytest.raises(ValueError, match="image_size is 250, which .* patches of 16 pixels"):
            TimmBackbone("xcit_nano_12_p16_224", image_size=250)


def test_a_norm_over_the_features_does_not_forbid_chunks():
    with torch.device("meta"):
        TimmBackbone("vit_tiny_patch16_224", norm=True, chunk=4).train().check_training(False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_clip_whose_activation_timm_changes_is_refused_with_its_weights(device):
    name = "vit_base_patch32_clip_224.openai"
    pretrained, weights = (True, None) if device == "meta" else (False, "clip.safetensors")
    with torch.device(device), pytest.raises(ValueError, match="take vit_base_patch32_clip_quick"):
        create_body(name, pretrained, None, {}, weights)
    with torch.device("meta"):  # without its weights there is nothing that would not fit
        create_body(name, False, None, {})
        create_body(name.replace("_clip_", "_clip_quickgelu_"), True, None, {})


def test_weights_that_are_cut_off_are_told_in_a_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"a.safetensors is no file of weights: "):
        create_body("convnext_atto", False, None, {}, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_drops_nothing_in_training(frozen):
    vision = {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "kwargs": {"embed_dim": 16, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5},
    }
    model = make_model("concat", vision=vision).train()
    if frozen:
        for parameter in model.vision.parameters():
            parameter.requires_grad_(False)
        model.train()
    pixels = torch.randn(4, 3, *model.vision.preprocessing.size)
    same = torch.equal(model.vision(pixels), model.vision(pixels))
    assert same == frozen


@pytest.mark.parametrize(
    ("name", "size", "other", "output"),
    [
        ("swin_tiny_patch4_window7_224", 56, 112, "penultimate"),
        ("beit_base_patch16_224", 64, 96, "penultimate"),
        ("maxvit_tiny_tf_224", 224, 256, "penultimate"),
        ("pvt_v2_b0", 256, 128, "last"),
    ],
)
@pytest.mark.fast_cases(1)
def test_a_model_may_be_set_to_another_size_whatever_it_has_lost(name, size, other, output):
    with torch.device("meta"):
        model = TimmBackbone(name, image_size=size, output=output)
        patches = model.patches
        model.set_image_size(other)
    assert (model.patches > patches) == (other > size)


def test_a_model_that_was_built_at_a_size_may_be_asked_for_at_another():
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 64}
    model = TimmBackbone("vit_tiny_patch16_224", image_size=96, kwargs=kwargs)
    assert model.grid == (6, 6)
    with pytest.raises(ValueError, match="kwargs: img_size is 64"):
        TimmBackbone("vit_tiny_patch16_224", kwargs={**kwargs, "img_size": 64}, resize="stretch")


def test_mvit_is_built_at_its_size_and_cannot_be_set_to_another():
    """Its tables are looked up from the middle of the grid of now."""
    with torch.device("meta"):
        model = TimmBackbone("mvitv2_tiny", image_size=160)
        first = model.body.stages[0].blocks[0].attn
        assert first.rel_pos_h.shape[0] == 2 * 40 - 1
        with pytest.raises(ValueError, match="has the size that it was built with"):
            model.set_image_size(256)


@pytest.mark.parametrize(
    ("name", "output"),
    [("vit_base_patch16_rope_mixed_224", "last"), ("samvit_base_patch16", "last")],
)
def test_the_last_block_is_a_block_and_not_what_timm_does_not_name(name, output):
    with torch.device("meta"):
        model = TimmBackbone(name, output=output, image_size=224)
    names = {id(p): n for n, p in model.body.named_parameters()}
    last = [names[id(p)] for p in model.blocks()[-1]]
    assert any(name.startswith("blocks.11.") for name in last)
    assert not any(
        "rope" in name for block in model.blocks() for name in (names[id(p)] for p in block)
    )
