"""Opening pictures safely: inside the image root, under a pixel limit, as RGB and upright."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from owlfuse.types import DataError

MAX_PIXELS = 100_000_000
"""Of a picture, where nothing else is said."""


def open_image(root: Path, path: str, name: str, max_pixels: int) -> Image.Image:
    """The picture at `path` below `root`, RGB, EXIF rotation applied, transparency on white.

    The size is read from the header, before anything is decoded.

    Raises:
        DataError: a path that leaves the root, no such file, no picture, or more than `max_pixels`; names the sample `name`.
    """
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(f"sample {name}: image {path} leaves the image root {root}")
    try:
        with Image.open(resolved) as picture:
            pixels = picture.width * picture.height
            if pixels > max_pixels:
                raise DataError(f"sample {name}: image {path} has {pixels:,} pixels, over the limit of {max_pixels:,}")
            return to_rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise DataError(f"sample {name}: no image {path} in {root}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"sample {name}: image {path}: {error}") from error
    except (OSError, SyntaxError) as error:
        raise DataError(f"sample {name}: image {path} cannot be read: {error}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, with what is transparent shown on white."""
    if picture.mode == "RGB":
        return picture.copy()
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")
