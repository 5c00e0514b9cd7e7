"""Pictures inside the page itself: small, encoded anew, and in no file that could be asked for."""

from __future__ import annotations

import base64
import io

from PIL import Image

SIDE = 320
"""Pixels of the longer side at most."""
SMALL = 128
"""Pixels below which a picture is enlarged by a whole number, so that its own pixels are seen."""


def fitted(picture: Image.Image) -> Image.Image:
    """The picture in the page's size."""
    longest = max(picture.size)
    if longest < SMALL:
        factor = -(-SMALL // longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if longest <= SIDE:
        return picture
    scale = SIDE / longest
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def data_uri(picture: Image.Image) -> str:
    """A fitted RGB picture as a `data:` URI: PNG, or JPEG where that is much smaller, as of a photograph."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG")
    picture.save(jpeg, "JPEG", quality=88)
    kind, file = ("jpeg", jpeg) if 2 * jpeg.tell() < png.tell() else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
