"""Opening pictures safely: inside the image root, under a pixel limit, as 8-bit RGB and upright."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image, ImageOps

from owlfuse.core.errors import DataError

MAX_PIXELS = 100_000_000
"""Of a picture, where nothing else is said."""

AT_ONCE = 2**26
"""Bytes of a file that is read whole before its header is looked at; a larger one is read as its
decoder asks."""

FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "ICO",
)
"""What is decoded, whatever a file's name ends in.

PIL knows others, of which EPS is a program that is run.
"""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def open_image(root: Path, image: str | bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture at the path `image` below `root`, or of the encoded bytes `image`: RGB, EXIF
    rotation applied, transparency on white, the first frame of several, 16-bit grey scaled to 8
    bits.

    The size is read from the header, before anything is decoded.

    Raises:
        DataError: a path that leaves the root, a URL, no such file, no picture, or more than
            `max_pixels`; names the sample `name`.
    """
    label = f"sample {name}: image " + (
        f"of {len(image):,} bytes" if isinstance(image, bytes) else image[:200]
    )
    try:
        if isinstance(image, bytes):
            return decode(io.BytesIO(image), label, max_pixels)
        with opened(root, image, label) as file:
            return decode(file, label, max_pixels)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"sample {name}: no image {image!s} in {root}") from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{label} cannot be read: {found_instead(root, image)}, expected a picture"
        ) from None
    except Exception as error:  # PIL's decoders raise whatever a broken file leads them to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{label} cannot be read: {reason}") from error


def opened(root: Path, path: str, label: str) -> io.BufferedIOBase:
    """The file at `path` below `root`, read in one go where it is small. Raises as `place_of`, and
    OSError.

    The usual file costs one look at its folder, which is remembered, and one opening that follows
    no link; whatever that does not answer is left to `place_of`.
    """
    if _URL.match(path):
        raise DataError(
            f"{label} is a URL, expected a path below {root}; pictures are not fetched, download "
            "them first"
        )
    name = path[path.rfind("/") + 1 :]
    if name in ("", ".", ".."):
        return place_of(root, path, label).open("rb")
    try:
        folder = folder_below(os.getcwd(), root, path[: -len(name)])
        # a pipe would be waited for
        descriptor = os.open(folder + name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return place_of(root, path, label).open("rb")
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > AT_ONCE:
        os.close(descriptor)
        return place_of(root, path, label).open("rb")
    try:
        return io.BytesIO(os.read(descriptor, facts.st_size))
    finally:
        os.close(descriptor)


@lru_cache(maxsize=4096)
def folder_below(here: str, root: Path, folder: str) -> str:
    """A folder of `root` with its links followed, with a slash at its end. Raises OSError where it
    is not there or not below `root`; what is raised is not remembered.

    Args:
        here: where relative roots start from.
    """
    place = (Path(here) / root / folder).resolve(strict=True)
    if not place.is_relative_to((Path(here) / root).resolve()):
        raise OSError(f"{folder} is not below {root}")
    return os.path.join(place, "")


def place_of(root: Path, path: str, label: str) -> Path:
    """The file below `root`, links followed.

    Raises DataError where it is not below it, or no file.
    """
    place = (root / path).resolve()
    if not place.is_relative_to(root.resolve()):
        raise DataError(f"{label} leaves the image root {root}")
    if not place.is_file() and place.exists():  # a pipe would be waited for
        what = "a folder" if place.is_dir() else "no ordinary file"
        raise DataError(f"{label} cannot be read: it is {what}, expected a picture")
    return place


def found_instead(root: Path, image: str | bytes) -> str:
    """What lies where no picture lies, for a message."""
    size = len(image) if isinstance(image, bytes) else (root / image).stat().st_size
    return "it is empty" if not size else f"its {size:,} bytes are none of {', '.join(FORMATS)}"


@cache
def decoders() -> tuple[str, ...]:
    """Those of FORMATS that this PIL has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: io.BufferedIOBase, label: str, max_pixels: int) -> Image.Image:
    """The picture of an open file. Raises DataError over `max_pixels`, before decoding."""
    with warnings.catch_warnings():
        # the limit here is max_pixels
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture = Image.open(cast("IO[bytes]", file), formats=decoders())
    with picture:
        pixels = picture.width * picture.height
        if pixels > max_pixels:
            raise DataError(f"{label} has {pixels:,} pixels, over the limit of {max_pixels:,}")
        picture.load()
        turn_upright(picture)
        return to_rgb(picture)


def turn_upright(picture: Image.Image) -> None:
    """Turns a picture in place as its EXIF says."""
    # Pillow raises whatever its parsers meet in a damaged EXIF, among them SyntaxError and
    # struct.error. Such a picture is shown as it is stored, as in every viewer.
    with suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits, with what is transparent shown on white.

    Raises ValueError for pixels of 32 bits.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        return from_grey(picture)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")


def from_grey(picture: Image.Image) -> Image.Image:
    """16-bit grey as RGB, 65535 as 255, which PIL's own conversion would clip."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels are of 32 bits (mode {picture.mode}), expected 8 or 16")
    values = values.astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
