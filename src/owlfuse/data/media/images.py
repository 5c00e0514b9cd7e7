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

from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.types import Media

# The default limit for a picture.
MAX_PIXELS = 100_000_000

# Bytes up to which a file is read at once; a larger one is read as its decoder asks.
SMALL_FILE = 2**26

# Formats that are decoded, whatever a file's name ends in.
# PIL knows others, of which EPS is a program that is run.
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

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def check_max_pixels(max_pixels: int, key: str) -> int:
    """Return a limit of pixels that has been set under `key`.

    Raises ConfigError for one below 1, or above what PIL opens.
    """
    # PIL's own error, of which it warns from a half on; None is no limit.
    limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else max_pixels
    if not 1 <= max_pixels <= limit:
        raise ConfigError(
            f"{key} is {max_pixels:,}, expected a number from 1 to {limit:,}, above which PIL "
            "opens no picture"
        )
    return max_pixels


def open_image(
    root: Path,
    image: Media,
    name: str,
    max_pixels: int,
) -> Image.Image:
    """Return the picture at the path `image` below `root`, or of the encoded bytes `image`: RGB,
    EXIF rotation applied, transparency on white, the first frame of several, 16-bit grey scaled to
    8 bits.

    The size is read from the header, before anything is decoded.

    Raises:
        DataError: a path that leaves the root, a URL, no such file, no picture, or more than
            `max_pixels`; names the sample `name`.
    """
    if isinstance(image, bytes):
        label = f"sample {name}: image of {len(image):,} bytes"
    else:
        label = f"sample {name}: image {image[:200]}"
    try:
        if isinstance(image, bytes):
            return decode(io.BytesIO(image), label, max_pixels)
        with opened(root, image, label) as file:
            return decode(file, label, max_pixels)
    except DataError:
        raise
    except FileNotFoundError:
        hint = "; the folders of a path are divided by /" if "\\" in str(image) else ""
        raise DataError(f"sample {name}: no image {image!s} in {root}{hint}") from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{label} cannot be read: {describe_content(root, image)}, expected a picture"
        ) from None
    except Exception as error:  # PIL's decoders raise whatever a broken file leads them to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{label} cannot be read: {reason}") from error


def opened(root: Path, path: str, label: str) -> io.BufferedIOBase:
    """Open the file at `path` below `root`; a small one is read at once. Raises as `resolve_path`,
    and OSError.

    The usual file costs one look at its folder, which is remembered, and one opening that follows
    no link; other files take `resolve_path`.
    """
    if _URL.match(path):
        raise DataError(
            f"{label} is a URL, expected a path below {root}; pictures are not fetched, download "
            "them first"
        )
    name = path[path.rfind("/") + 1 :]
    if name in ("", ".", ".."):
        return resolve_path(root, path, label).open("rb")
    try:
        # The working directory is a part of the cache's key, for roots that are relative.
        folder = folder_below(os.getcwd(), root, path[: -len(name)])
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(folder + name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return resolve_path(root, path, label).open("rb")
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size <= SMALL_FILE:
            return io.BytesIO(os.read(descriptor, status.st_size))
    finally:
        os.close(descriptor)
    return resolve_path(root, path, label).open("rb")


@lru_cache(maxsize=4096)
def folder_below(working_dir: str, root: Path, folder: str) -> str:
    """Return a folder of `root` with its links followed, with a slash at its end. Raises OSError
    where it is missing or not below `root`, which is not remembered.

    Args:
        working_dir: where relative roots start from.
    """
    path = (Path(working_dir) / root / folder).resolve(strict=True)
    if not path.is_relative_to((Path(working_dir) / root).resolve()):
        raise OSError(f"{folder} is not below {root}")
    return os.path.join(path, "")


def resolve_path(root: Path, path: str, label: str, expected: str = "picture") -> Path:
    """Return the file below `root`, links followed; whether it exists is left to whoever opens it.

    Raises DataError where it is not below it, or no ordinary file, and what Python raises for a
    path that is none.
    """
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(f"{label} leaves the image root {root}")
    if not resolved.is_file() and resolved.exists():  # opening a pipe would wait for a writer
        kind = "a folder" if resolved.is_dir() else "no ordinary file"
        raise DataError(f"{label} cannot be read: it is {kind}, expected a {expected}")
    return resolved


def describe_content(root: Path, image: Media) -> str:
    """Return what a file that is no picture holds, for a message."""
    size = len(image) if isinstance(image, bytes) else (root / image).stat().st_size
    if not size:
        return "it is empty"
    return f"its {size:,} bytes are none of {', '.join(FORMATS)}"


@cache
def decoders() -> tuple[str, ...]:
    """Return those of FORMATS that this PIL has."""
    # Most plugins of PIL are registered by this call alone.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: io.BufferedIOBase, label: str, max_pixels: int) -> Image.Image:
    """Return the picture of an open file. Raises DataError over `max_pixels`, before decoding."""
    with warnings.catch_warnings():
        # PIL warns from half of the pixels on that it opens; max_pixels is the limit here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture = Image.open(cast("IO[bytes]", file), formats=decoders())
    with picture:
        pixels = picture.width * picture.height
        # The header alone has been read: a bomb of gigapixels is not decoded.
        if pixels > max_pixels:
            raise DataError(f"{label} has {pixels:,} pixels, over the limit of {max_pixels:,}")
        pages = count_pages(picture)
        picture.load()
        turn_upright(picture)
        shown = to_rgb(picture)
    shown.info["pages"] = pages
    return shown


def count_pages(picture: Image.Image) -> int:
    """Return how many pages or frames a picture's file has, of which the first is shown."""
    # The further frames of a phone's MPO are previews and depths.
    if picture.format == "MPO":
        return 1
    # Pillow reads the headers of the others, and raises whatever it meets in damaged ones, as of an
    # EXIF (see `turn_upright`); the first page, which alone is shown, is read all the same.
    with suppress(Exception):
        return getattr(picture, "n_frames", 1)
    return 1


def upright(picture: Image.Image) -> Image.Image:
    """Return a picture in memory as `open_image` gives one of a file; it stays as it is."""
    picture = picture.copy()
    turn_upright(picture)
    return to_rgb(picture)


def turn_upright(picture: Image.Image) -> None:
    """Turn a picture in place as its EXIF says."""
    # Pillow raises whatever its parsers meet in a damaged EXIF, among them SyntaxError and
    # struct.error. Such a picture is shown as it is stored, as in every viewer.
    with suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB of 8 bits, transparent pixels on white.

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


# Tags of TIFF.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
WHITE_IS_ZERO = 0


def from_grey(picture: Image.Image) -> Image.Image:
    """Return 16-bit grey as RGB, 65535 as 255, which PIL's own conversion would clip; of a TIFF of
    12 bits 4095 as 255."""
    values = np.asarray(picture)
    # of a small number of 32 bits nobody knows whether it is one of 8 or of 16
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, ())
    if picture.mode == "F" or 32 in bits or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels are of 32 bits (mode {picture.mode}), expected 8 or 16")
    # uint16 would overflow in the sum.
    values = values.astype(np.uint32)
    white = 4095 if 12 in bits else 65535
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which PIL turns for 8 bits alone
        grey = 255 - grey
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
