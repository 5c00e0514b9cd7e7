"""Pictures inside the page itself: small, encoded anew, and in no file that could be asked for."""

from __future__ import annotations

import base64
import io

from PIL import Image

SIDE = 320
"""Pixels of the longer side at most."""
SMALL = 96
"""Pixels below which a picture is enlarged by whole numbers, so that its own pixels are seen."""


def data_uri(picture: Image.Image) -> str:
    """An RGB picture as a `data:` URI, at most SIDE pixels wide and high."""
    longest = max(picture.size)
    if longest < SMALL:
        factor = -(-SMALL // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    elif longest > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE))
    kind, options = ("PNG", {}) if longest <= SIDE else ("JPEG", {"quality": 85})
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
