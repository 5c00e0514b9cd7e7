"""Pictures inside the page itself: small, encoded anew, and in no file that could be asked for."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from owlfuse.evaluation.explain.attention import attention_to_pictures, picture_maps
from owlfuse.evaluation.explain.overlays import density, overlay
from owlfuse.serving.chat import Conversation

SIDE = 320
"""Pixels of the longer side at most."""
SMALL = 128
"""Pixels below which a picture is enlarged by a whole number, so that its own pixels are seen."""


def fitted(picture: Image.Image) -> Image.Image:
    """The picture in the page's size."""
    longest = max(picture.size)
    if longest < SMALL:
        factor = -(-SMALL // longest)
        return picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    if longest <= SIDE:
        return picture
    scale = SIDE / longest
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    )


def data_uri(picture: Image.Image) -> str:
    """A fitted RGB picture as a `data:` URI:

    PNG, or JPEG where that is much smaller, as of a photograph.
    """
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG")
    picture.save(jpeg, "JPEG", quality=88)
    kind, file = ("jpeg", jpeg) if 2 * jpeg.tell() < png.tell() else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass
class Look:
    """A picture with where the answer looked."""

    uri: str
    """Of the overlay."""
    share: float
    """Of all that the answer looked at, over the conversation's pictures."""


def looked_at(conversation: Conversation) -> list[Look]:
    """One for each picture of the conversation, the same color for the same weight in all. No other
    thread may use the model meanwhile. Raises as `attention_to_pictures`."""
    if conversation.last is None or not conversation.pictures:
        return []
    _, inputs, answer_ids = conversation.last
    pictures, processor = conversation.pictures, conversation.processor
    maps = picture_maps(
        processor, pictures, attention_to_pictures(conversation.model, inputs, answer_ids)
    )
    peak = max(float(density(one).max()) for one in maps)
    return [
        Look(data_uri(overlay(fitted(picture), one, peak)), float(one.sum()))
        for picture, one in zip(pictures, maps, strict=True)
    ]
