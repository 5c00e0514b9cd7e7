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
SMALL_SIDE = 128
"""Pixels below which a picture is enlarged by a whole number, so that its own pixels are seen."""


def fitted(picture: Image.Image) -> Image.Image:
    """Return the picture in the page's size."""
    longest = max(picture.size)
    if longest < SMALL_SIDE:
        factor = -(-SMALL_SIDE // longest)  # rounded up
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    if longest <= SIDE:
        return picture
    scale = SIDE / longest
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size)


def data_uri(picture: Image.Image) -> str:
    """Return a fitted RGB picture as a `data:` URI: PNG, or JPEG where that is much smaller, as of
    a photograph."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG")
    picture.save(jpeg, "JPEG", quality=88)
    # PNG keeps every pixel; of a photograph it is many times as large.
    kind, file = ("jpeg", jpeg) if 2 * jpeg.tell() < png.tell() else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass
class AttentionPicture:
    """A picture with where the answer looked."""

    uri: str
    """Of the overlay."""
    share: float
    """Of all that the answer looked at, over the conversation's pictures."""


def attention_pictures(conversation: Conversation) -> list[AttentionPicture]:
    """Return one for each picture of the conversation, the same color for the same weight in all.

    No other thread may use the model meanwhile. Raises as `attention_to_pictures`.
    """
    if conversation.last is None or not conversation.pictures:
        return []
    _, inputs, answer_ids = conversation.last
    attention = attention_to_pictures(conversation.model, inputs, answer_ids)
    maps = picture_maps(conversation.processor, conversation.pictures, attention)
    # One scale for all: a picture that was hardly looked at stays dark.
    peak = max(float(density(weights).max()) for weights in maps)
    result = []
    for picture, weights in zip(conversation.pictures, maps, strict=True):
        uri = data_uri(overlay(fitted(picture), weights, peak))
        result.append(AttentionPicture(uri, float(weights.sum())))
    return result
