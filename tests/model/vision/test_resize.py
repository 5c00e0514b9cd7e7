"""What becomes of a picture's aspect ratio, pixel by pixel against PIL and torchvision, and wherever
pictures are made into pixels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as VF

from helpers import LINEAR, VIT
from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor
from owlfuse.artifacts.init_from import find_conflicts
from owlfuse.core.errors import ConfigError
from owlfuse.data.media.tiles import check_tiled
from owlfuse.evaluation.explain.attention import over_picture
from owlfuse.model.vision.backbone import TimmBackbone
from owlfuse.model.vision.base import Preprocessing
from owlfuse.model.vision.multi import MultiBackbone

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [(50, 90), (90, 50), (20, 17), (64, 64), (7, 300), (300, 7), (31, 33)]
METHODS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def picture(height, width):
    numbers = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    return Image.fromarray(numbers.astype(np.uint8))


def normalised(view):
    values = np.asarray(view, dtype=np.float64) / 255
    return ((values - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", [(32, 32), (24, 40)])
@pytest.mark.parametrize("interpolation", METHODS)
def test_letterbox_and_crop_are_those_of_pil_pixel_by_pixel(size, view, interpolation):
    raw, method = picture(*size), METHODS[interpolation]
    fill = (122, 117, 104)
    expected = {
        "stretch": raw.resize(view[::-1], method),
        "letterbox": ImageOps.pad(raw, view[::-1], method, color=fill),
        "crop": ImageOps.fit(raw, view[::-1], method),
    }
    for resize, reference in expected.items():
        preprocessing = Preprocessing(view, MEAN, STD, interpolation, resize)
        got = preprocessing(raw)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), normalised(reference), rtol=0, atol=1e-5)
        if resize == "letterbox":
            assert got.abs().max() < 4


def test_crop_is_torchvisions_shorter_side_and_middle_but_for_the_border():
    raw = picture(64, 128)
    preprocessing = Preprocessing((32, 32), MEAN, STD, "bicubic", "crop")
    resized = VF.resize(raw, [32], VF.InterpolationMode.BICUBIC)
    expected = np.asarray(VF.center_crop(resized, [32, 32]), dtype=np.int64)
    got = np.asarray(preprocessing.view(raw), dtype=np.int64)
    # the filter's support ends at the cut
    assert np.array_equal(got[:, 2:-2], expected[:, 2:-2])


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
@pytest.mark.parametrize("resize", ["letterbox", "crop"])
def test_a_picture_however_thin_has_a_view(size, resize):
    preprocessing = Preprocessing((16, 16), MEAN, STD, "bicubic", resize)
    raw = Image.new("RGB", size[::-1], (255, 0, 0))
    view = np.asarray(preprocessing.view(raw)).reshape(-1, 3)
    assert (view == (255, 0, 0)).all(1).any()


def test_bars_are_of_the_mean_colour_and_normalised_next_to_nothing():
    preprocessing = Preprocessing((16, 16), MEAN, STD, "bicubic", "letterbox")
    pixels = preprocessing(Image.new("RGB", (40, 20), "white"))
    bars = torch.cat([pixels[:, :4], pixels[:, 12:]], dim=1)
    assert bars.abs().max() < 1 / 255 / min(STD)
    assert pixels[:, 4:12].min() > 1


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_the_processor_of_an_export_makes_the_pixels_of_training(resize, tmp_path):
    model = TimmBackbone(**{k: v for k, v in VIT.items() if k != "_target_"}, resize=resize)
    processor = OwlfuseImageProcessor.of(model.preprocessing)
    processor.save_pretrained(tmp_path)
    loaded = OwlfuseImageProcessor.from_pretrained(tmp_path)
    assert loaded.preprocessing() == model.preprocessing
    raw = picture(50, 90)
    assert torch.equal(loaded([raw])["pixel_values"][0], model.preprocessing(raw))


def test_an_export_from_before_it_could_be_chosen_stretches(tmp_path):
    preprocessing = Preprocessing((16, 16), MEAN, STD, "bicubic")
    OwlfuseImageProcessor.of(preprocessing).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    fields = json.loads(file.read_text())
    del fields["resize"]
    file.write_text(json.dumps(fields))
    assert OwlfuseImageProcessor.from_pretrained(tmp_path).preprocessing() == preprocessing


def test_another_size_keeps_it_and_several_backbones_have_one_for_all():
    arguments = {key: value for key, value in VIT.items() if key != "_target_"}
    with torch.device("meta"):
        model = TimmBackbone(**arguments, resize="crop")
        model.set_image_size(64)
        multi = MultiBackbone({"a": VIT, "b": VIT}, resize="letterbox")
        with pytest.raises(ValueError, match=r"backbones\.b: resize is the same for all"):
            MultiBackbone({"a": VIT, "b": {**VIT, "resize": "crop"}})
    assert (model.preprocessing.size, model.preprocessing.resize) == ((64, 64), "crop")
    assert multi.preprocessing.resize == "letterbox"


@pytest.mark.parametrize("resize", ["letterbox", "crop"])
def test_tiles_are_refused_in_one_line(resize):
    check_tiled("stretch")
    with pytest.raises(ConfigError, match=f"pictures are tiled, and .*resize is {resize}; set"):
        check_tiled(resize)


def test_a_run_from_an_export_that_stretches_refuses_another_wish():
    """Also where the export is from before the key."""
    conflicts = find_conflicts({**VIT, "resize": "crop"}, LINEAR, VIT)
    assert conflicts == {"resize": ("stretch", "crop")}
    assert find_conflicts({**VIT, "resize": "stretch"}, LINEAR, VIT) == {}


@pytest.mark.parametrize("resize", ["letterbox", "crop"])
@pytest.mark.parametrize("size", [(60, 120), (120, 60), (64, 64)])
def test_a_map_lies_where_the_backbone_saw_the_picture(resize, size):
    """A bright patch of the picture and the cell of the map over it are in the same place."""
    height, width = size
    preprocessing = Preprocessing((64, 64), MEAN, STD, "bilinear", resize)
    for y, x in ((0.3, 0.4), (0.6, 0.7)):
        raw = np.zeros((height, width, 3), np.uint8)
        top, left = int(y * height), int(x * width)
        raw[top : top + 6, left : left + 6] = 255
        view = np.asarray(preprocessing.view(Image.fromarray(raw)))[..., 0].astype(float)
        if resize == "letterbox":
            view[view == int(MEAN[0] * 255)] = 0
        cells = torch.from_numpy(view.reshape(8, 8, 8, 8).mean((1, 3))).float()
        map = over_picture(cells / cells.sum(), (width, height), preprocessing)
        row, column = divmod(int(map.argmax()), map.shape[1])
        found = (row + 0.5) / map.shape[0] * height, (column + 0.5) / map.shape[1] * width
        cell = max(size) / 8
        assert abs(found[0] - top - 3) <= cell
        assert abs(found[1] - left - 3) <= cell
        assert map.sum().item() == pytest.approx(1, abs=0.1)
    even = over_picture(torch.full((8, 8), 1 / 64), (width, height), preprocessing)
    seen = min(size) / max(size)
    assert even.sum().item() == pytest.approx(seen if resize == "letterbox" else 1, abs=0.02)
    assert ((even > 0).float().mean().item() < 0.99) == (resize == "crop" and seen < 1)
