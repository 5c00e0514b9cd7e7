"""Picture files that are wrong, and files that look wrong and are not."""

import os
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (20, 10)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(mode="RGB", size=SIZE):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def png_header(path, width, height):
    """A PNG that says it is huge; were it decoded, the machine's memory would be gone."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    parts = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in (chunk, data, b"IEND")
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_wrong(root):
    """Files below `root`, and what of them is named by the test of `bad_input`."""
    noise().save(root / "good.png")
    (root / "empty.png").touch()
    noise().save(root / "cut.jpg")
    cut(root / "cut.jpg")
    noise().save(root / "cut.png")
    cut(root / "cut.png")
    noise().save(root / "cut.webp", lossless=True)
    cut(root / "cut.webp")
    (root / "text.png").write_text("no picture")
    (root / "page.jpg").write_text("<!doctype html><title>404</title>")
    png_header(root / "bomb.png", 60_000, 60_000)
    png_header(root / "large.png", 1001, 1000)
    noise().save(root / "broken.png")
    data = bytearray((root / "broken.png").read_bytes())
    data[60:90] = bytes(30)
    (root / "broken.png").write_bytes(data)
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "nowhere.png").symlink_to(root / "none.png")
    noise().save(root.parent / "outside.png")
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "up").symlink_to(root.parent)
    (root / "drawing.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    )
    noise().save(root / "secret.png")
    Image.fromarray(np.full((10, 20), 0.5, dtype=np.float32)).save(root / "float.tiff")
    Image.fromarray(np.full((10, 20), 100_000, dtype=np.int32)).save(root / "int32.tiff")


def write_odd(root):
    """Name -> (size, the colour at the top left, a tolerance) of files that must be read right."""
    expected = {}

    def add(name, picture, colour, size=SIZE, tolerance=0, **options):
        picture.save(root / name, **options)
        expected[name] = (size, colour, tolerance)

    add("cmyk.jpg", Image.new("CMYK", SIZE, (0, 255, 255, 0)), RED, tolerance=6, quality=95)
    add("cmyk.tiff", Image.new("CMYK", SIZE, (0, 255, 255, 0)), RED)
    add("deep.png", Image.fromarray(np.full(SIZE[::-1], 32896, dtype=np.uint16)), (128,) * 3)
    add("deep_bright.png", Image.fromarray(np.full(SIZE[::-1], 65535, dtype=np.uint16)), WHITE)
    add("deep_dark.tiff", Image.fromarray(np.full(SIZE[::-1], 257, dtype=np.uint16)), (1,) * 3)
    add(
        "deep_big.tiff",
        Image.frombytes("I;16B", SIZE, np.full(SIZE, 51400, dtype=">u2").tobytes()),
        (200,) * 3,
    )
    add(
        "deep_clear.png",
        Image.fromarray(np.full(SIZE[::-1], 7, dtype=np.uint16)),
        WHITE,
        transparency=7,
    )
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([0, 0, 0, *RED])
    add("palette.png", palette, RED)
    add("palette_clear.png", palette, WHITE, transparency=1)
    add("palette_half.png", palette, (255, 127, 127), transparency=bytes([255, 128]), tolerance=1)
    add("clear.gif", palette, WHITE, transparency=1)
    frames = [Image.new("RGB", SIZE, colour) for colour in ("blue", "lime")]
    moving = {"save_all": True, "append_images": frames}
    add("moving.gif", Image.new("RGB", SIZE, RED), RED, **moving)
    add("moving.webp", Image.new("RGB", SIZE, RED), RED, lossless=True, **moving)
    add("moving.png", Image.new("RGB", SIZE, RED), RED, **moving)
    add("pages.tiff", Image.new("RGB", SIZE, RED), RED, **moving)
    turned = Image.new("RGB", SIZE, "blue")
    # bottom left, which a quarter turn to the right brings to the top left
    turned.paste(RED, (0, 5, 10, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    add("turned.jpg", turned, RED, SIZE[::-1], 6, exif=exif, quality=95)
    add("turned.png", turned, RED, SIZE[::-1], exif=exif)
    add(
        "strange_exif.jpg",
        Image.new("RGB", SIZE, RED),
        RED,
        tolerance=6,
        quality=95,
        exif=b"Exif\0\0broken",
    )
    add("dot.png", Image.new("RGB", (1, 1), RED), RED, (1, 1))
    add("tall.png", Image.new("RGB", (1, 10_000), RED), RED, (1, 10_000))
    add("wide.png", Image.new("RGB", (10_000, 1), RED), RED, (10_000, 1))
    add("grey.png", Image.new("L", SIZE, 77), (77,) * 3)
    add("grey_clear.png", Image.new("LA", SIZE, (77, 0)), WHITE)
    add("rgb_clear.png", Image.new("RGB", SIZE, RED), WHITE, transparency=RED)
    add("bits.png", Image.new("1", SIZE, 1), WHITE)
    add("really_png.jpg", Image.new("RGB", SIZE, RED), RED, format="PNG")
    add("really_jpeg.png", Image.new("RGB", SIZE, RED), RED, tolerance=6, format="JPEG", quality=95)
    add("no_ending", Image.new("RGB", SIZE, RED), RED, format="PNG")
    add("ünïcode 画.png", Image.new("RGB", SIZE, RED), RED)
    return expected
