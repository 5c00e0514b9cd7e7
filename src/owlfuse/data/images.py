"""Opening pictures safely: inside the image root, under a pixel limit, as 8-bit RGB and upright."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from owlfuse.types import DataError

MAX_PIXELS = 100_000_000
"""Of a picture, where nothing else is said."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
"""What is decoded, whatever a file's name ends in. PIL knows others, of which EPS is a program that is run."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def open_image(root: Path, image: str | bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture at the path `image` below `root`, or of the encoded bytes `image`: RGB, EXIF rotation applied,
    transparency on white, the first frame of several, 16-bit grey scaled to 8 bits.

    The size is read from the header, before anything is decoded.

    Raises:
        DataError: a path that leaves the root, a URL, no such file, no picture, or more than `max_pixels`; names the sample
            `name`.
    """
    label = f"sample {name}: image " + (f"of {len(image):,} bytes" if isinstance(image, bytes) else image[:200])
    try:
        if isinstance(image, bytes):
            return decode(io.BytesIO(image), label, max_pixels)
        with place_of(root, image, label).open("rb") as file:
            return decode(file, label, max_pixels)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"sample {name}: no image {image} in {root}") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{label} cannot be read: {found_instead(root, image)}, expected a picture") from None
    except Exception as error:  # PIL's decoders raise whatever a broken file leads them to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{label} cannot be read: {reason}") from error


def place_of(root: Path, path: str, label: str) -> Path:
    """The file below `root`, links followed. Raises DataError where it is not below it, or no file."""
    if _URL.match(path):
        raise DataError(f"{label} is a URL, expected a path below {root}; pictures are not fetched, download them first")
    joined = root / path
    place = resolved(joined.parent) / joined.name
    if joined.name in ("", ".", "..") or place.is_symlink():
        place = place.resolve()
    if not place.is_relative_to(resolved(root)):
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


@lru_cache(maxsize=4096)
def resolved(folder: Path) -> Path:
    """A folder with its links followed, once: each picture in it asks for it."""
    return folder.resolve()


def decode(file: io.IOBase, label: str, max_pixels: int) -> Image.Image:
    """The picture of an open file. Raises DataError over `max_pixels`, before decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is max_pixels
        picture = Image.open(file, formats=decoders())
    with picture:
        pixels = picture.width * picture.height
        if pixels > max_pixels:
            raise DataError(f"{label} has {pixels:,} pixels, over the limit of {max_pixels:,}")
        picture.load()
        with suppress(Exception):  # EXIF that cannot be read turns nothing, as in every viewer
            ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits, with what is transparent shown on white. Raises ValueError for pixels of 32 bits."""
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
