"""Odd pictures are read right, from paths and from bytes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bad_pictures import noise, write_odd
from owlfuse.core.errors import DataError
from owlfuse.data.media import images
from owlfuse.data.media.images import open_image


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    return root, write_odd(root)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_odd_pictures_are_eight_bit_rgb_upright_and_of_the_right_colour(odd, as_bytes):
    root, expected = odd
    assert len(expected) > 25
    for name, (size, colour, tolerance) in expected.items():
        opened = open_image(root, (root / name).read_bytes() if as_bytes else name, "s", 10**6)
        found = opened.getpixel((0, 0))
        assert (opened.mode, opened.size) == ("RGB", size), name
        assert max(abs(a - b) for a, b in zip(found, colour)) <= tolerance, (name, found)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "sample s: image of 0 bytes cannot be read: it is empty, expected a picture"),
        (
            b"no picture",
            "sample s: image of 10 bytes cannot be read: its 10 bytes are none of PNG, JPEG",
        ),
        (None, "sample s: image of [0-9,]+ bytes cannot be read: "),
    ],
)
def test_wrong_bytes_are_named_by_their_number(tmp_path, image, message):
    if image is None:
        noise().save(tmp_path / "a.jpg")
        image = (tmp_path / "a.jpg").read_bytes()[:400]
    with pytest.raises(DataError, match=message):
        open_image(tmp_path, image, "s", 1000)


def test_the_pixel_limit_holds_for_bytes_before_decoding(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        DataError, match="sample s: image of .* bytes has 200 pixels, over the limit of 199"
    ):
        open_image(tmp_path, data, "s", 199)


def test_an_absolute_path_and_dots_are_fine_as_long_as_they_stay_inside_the_root(tmp_path):
    (tmp_path / "a").mkdir()
    noise().save(tmp_path / "b.png")
    for path in (str(tmp_path / "b.png"), "a/../b.png"):
        assert open_image(tmp_path, path, "s", 1000).size == (20, 10)


def test_every_grey_of_sixteen_bits_is_scaled_and_none_clipped(tmp_path):
    import numpy as np

    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    opened = np.asarray(open_image(tmp_path, "a.png", "s", 10**6))
    assert abs(opened[..., 0] - values / 257).max() <= 0.5
    assert (opened == opened[..., :1]).all()


@pytest.mark.parametrize("at_once", [2**26, 10], ids=["whole", "large"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif"])
def test_pixels_are_those_of_plain_pil_however_the_file_is_read(
    tmp_path, monkeypatch, suffix, at_once
):
    (tmp_path / "a").mkdir()
    noise(size=(60, 40)).save(tmp_path / f"a/b.{suffix}")
    monkeypatch.setattr(images, "SMALL_FILE", at_once)
    with Image.open(tmp_path / f"a/b.{suffix}") as plain:
        assert (
            open_image(tmp_path, f"a/b.{suffix}", "s", 10**6).tobytes()
            == plain.convert("RGB").tobytes()
        )


def test_links_are_looked_at_after_their_folder_was_remembered_too(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "away").mkdir()
    for place in ("root/a/b.png", "root/c.png", "away/b.png"):
        noise().save(tmp_path / place)
    open_image(root, "a/b.png", "s", 1000)
    (root / "a/in.png").symlink_to(root / "c.png")
    assert open_image(root, "a/in.png", "s", 1000).size == (20, 10)
    (root / "a/out.png").symlink_to(tmp_path / "away/b.png")
    (root / "later").mkdir()
    (root / "later/out").symlink_to(tmp_path / "away")
    for path in (
        "a/out.png",
        "later/out/b.png",
        "../away/b.png",
        "a/../../away/b.png",
        str(tmp_path / "away/b.png"),
    ):
        for _ in range(2):  # nor is a refusal forgotten
            with pytest.raises(DataError, match="leaves the image root"):
                open_image(root, path, "s", 1000)


def test_a_folder_that_becomes_a_link_out_of_the_root_was_not_remembered_while_it_was_missing(
    tmp_path,
):
    (tmp_path / "root").mkdir()
    (tmp_path / "away").mkdir()
    noise().save(tmp_path / "away/b.png")
    with pytest.raises(DataError, match="no image a/b.png"):
        open_image(tmp_path / "root", "a/b.png", "s", 1000)
    (tmp_path / "root/a").symlink_to(tmp_path / "away")
    with pytest.raises(DataError, match="leaves the image root"):
        open_image(tmp_path / "root", "a/b.png", "s", 1000)


def test_a_relative_root_starts_from_the_working_folder_of_now(tmp_path, monkeypatch):
    for number, name in enumerate(("one", "two"), 1):
        (tmp_path / name / "root").mkdir(parents=True)
        noise(size=(number, 1)).save(tmp_path / name / "root/b.png")
        monkeypatch.chdir(tmp_path / name)
        assert open_image(Path("root"), "b.png", "s", 1000).size == (number, 1)


def test_a_tiff_of_32_bits_is_refused_however_small_its_numbers_are(tmp_path):
    Image.fromarray(np.full((10, 20), 200, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="of 32 bits"):
        open_image(tmp_path, "a.tif", "s", 10**6)
    Image.fromarray(np.full((10, 20), 51400, np.uint16)).save(tmp_path / "b.tif")
    assert open_image(tmp_path, "b.tif", "s", 10**6).getpixel((0, 0)) == (200, 200, 200)


def tiff_of_16_bits(path, value, photometric=1, bits=16):
    """A grey TIFF of one strip, whose tags Pillow does not write by itself."""
    if bits == 12:  # two pixels in three bytes
        data = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * 8
    else:
        data = value.to_bytes(2, "little") * 16
    tags = [
        (256, 3, 1, 4),
        (257, 3, 1, 4),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 3, 1, 4),
        (279, 4, 1, len(data)),
    ]
    content = b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data
    content += len(tags).to_bytes(2, "little")
    for tag, kind, count, number in tags:
        content += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        content += count.to_bytes(4, "little") + number.to_bytes(4, "little")
    path.write_bytes(content + b"\0" * 4)


@pytest.mark.parametrize(
    ("value", "photometric", "bits", "grey"),
    [
        (0xFFFF, 1, 16, 255),
        (0xFFFF, 0, 16, 0),
        (0, 0, 16, 255),
        (0xFFF, 1, 12, 255),
        (0x800, 1, 12, 128),
    ],
)
def test_grey_tiffs_of_12_and_16_bits_are_as_bright_as_they_say(
    tmp_path, value, photometric, bits, grey
):
    tiff_of_16_bits(tmp_path / "a.tif", value, photometric, bits)
    assert open_image(tmp_path, "a.tif", "s", 100).getpixel((1, 1)) == (grey,) * 3


@pytest.mark.parametrize("kind", ["tif", "gif", "webp", "png"])
def test_how_many_pages_or_frames_a_file_has_is_told(tmp_path, kind):
    pages = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    pages[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=pages[1:])
    opened = open_image(tmp_path, f"a.{kind}", "s", 100)
    assert opened.info["pages"] == 3
    assert opened.getpixel((0, 0))[0] > 200
    pages[0].save(tmp_path / f"b.{kind}")
    assert open_image(tmp_path, f"b.{kind}", "s", 100).info["pages"] == 1
