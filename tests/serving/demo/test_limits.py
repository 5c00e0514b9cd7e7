"""What the demo refuses, in a sentence that names the file as its owner does and no folder of
the server."""

import re
import struct
import zlib

import pytest
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.serving.demo import limits
from owlfuse.serving.demo.limits import check_question, read_pictures


def png_that_claims(width, height):
    """A PNG with the header of a large picture, and next to nothing in it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


BAD = {
    "a.svg": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "a.svg cannot be read",
    ),
    "a.html": (b"<script>alert(1)</script>", "a.html cannot be read"),
    "empty.png": (b"", "empty.png cannot be read: it is empty"),
    "cut.png": (png_that_claims(9, 9), "cut.png cannot be read"),
    "large.png": (
        png_that_claims(10_000, 6_000),
        "large.png has 60,000,000 pixels, over the limit of 50,000,000",
    ),
    "bomb.png": (
        png_that_claims(60_000, 60_000),
        "bomb.png cannot be read: Image size (3600000000 pixels) exceeds limit",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_a_sentence_without_the_folder_it_lies_in(name, tmp_path):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_pictures([str(tmp_path / name)], 0)
    assert str(caught.value).startswith(expected)
    assert str(tmp_path) not in str(caught.value)
    assert "demo" not in str(caught.value)


def test_a_picture_is_read_as_the_chat_reads_it(tmp_path):
    Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_pictures([str(tmp_path / "clear.png")], 0)[0].getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_limited_in_number_in_bytes_and_over_the_conversation(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    with pytest.raises(DataError, match="9 pictures are too many for one question; show at most 8"):
        read_pictures([path] * 9, 0)
    assert len(read_pictures([path] * 8, limits.MAX_PIXELS - 1600)) == 8
    with pytest.raises(
        DataError,
        match=re.escape("pixels, over the limit of 50,000,000; show smaller ones, or begin a new"),
    ):
        read_pictures([path] * 8, limits.MAX_PIXELS - 1599)
    monkeypatch.setattr(limits, "MAX_UPLOAD", 10)
    with pytest.raises(DataError, match=r"a\.png is larger than 0 MB"):
        read_pictures([path], 0)


def test_a_question_is_text_of_some_length_without_an_image_token():
    assert check_question("  What is it?\n", ["<image>"]) == "What is it?"
    assert len(check_question("x" * limits.MAX_CHARACTERS, ["<image>"])) == limits.MAX_CHARACTERS
    with pytest.raises(DataError, match="there is no question yet"):
        check_question(" \n", ["<image>"])
    with pytest.raises(
        DataError, match="the question has 8,001 characters, over the limit of 8,000"
    ):
        check_question("x" * 8001, ["<image>"])
    with pytest.raises(DataError, match="<image> stands for a picture"):
        check_question("an <image> of", ["<image>"])
