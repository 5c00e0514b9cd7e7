"""What the demo takes, and how it says no.

Every refusal is one sentence that a visitor can act on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.data.media.images import open_image

MAX_UPLOAD = 20 * 2**20
"""Bytes of one file."""
MAX_STORED = 500 * 2**20
"""Bytes of all files that were uploaded and not asked about yet."""
MAX_PIXELS = 50_000_000
"""Of one picture, and of all pictures of one conversation together, which stay in memory: 150
MB."""
MAX_PICTURES = 8
"""Of one question."""
MAX_CHARACTERS = 8_000
"""Of one question."""
MAX_NEW_TOKENS = 2_048
"""Of one answer."""
MAX_WAITING = 8
"""Questions whose answers a page is waiting for, of all visitors."""
UNASKED_SECONDS = 10.0
"""In which a page asks for the answers to the question that it sent.

One that does not is gone, and its question is over.
"""
ANSWER_SECONDS = 300.0
"""Of one answer of one model; then the next in the queue has its turn."""
MAX_VISITORS = 64
"""Conversations that are kept; beyond it the one that was silent longest is forgotten."""


def read_pictures(paths: Sequence[str], pixels: int) -> list[Image.Image]:
    """Return the uploaded files as RGB pictures.

    Args:
        pixels: that the conversation holds already.

    Raises:
        DataError: too many, too large, or one that is no picture; it is called by the name that its
            owner knows.
    """
    if len(paths) > MAX_PICTURES:
        raise DataError(
            f"{len(paths)} pictures are too many for one question; show at most {MAX_PICTURES}"
        )
    pictures = []
    for path in map(Path, paths):
        if path.stat().st_size > MAX_UPLOAD:
            raise DataError(
                f"{path.name} is larger than {MAX_UPLOAD // 2**20} MB; make it smaller and try "
                "again"
            )
        try:
            picture = open_image(path.parent, path.name, "demo", MAX_PIXELS)
        except DataError as error:
            raise DataError(public_message(error, path)) from None
        # Of the whole conversation, whose pictures stay in memory.
        pixels += picture.width * picture.height
        if pixels > MAX_PIXELS:
            raise DataError(
                f"with {path.name} the conversation's pictures have {pixels:,} pixels, over the "
                f"limit of {MAX_PIXELS:,}; show smaller ones, or begin a new conversation"
            )
        pictures.append(picture)
    return pictures


def public_message(error: DataError, path: Path) -> str:
    """Return `open_image`'s message without the folder of the upload, which is nobody's
    business."""
    message = " ".join(str(error).split())
    # Gradio's folder of an upload is named by a hash, which says nothing to its owner.
    message = message.replace(f"{path.parent}{os.sep}", "")
    message = message.replace(str(path.parent), "the upload")
    return message.removeprefix("sample demo: image ").removeprefix("sample demo: ")


def check_question(text: str, image_tokens: Iterable[str]) -> str:
    """Return the question without blanks around it.

    Raises:
        DataError: none, a very long one, or one with a token that stands for a picture.
    """
    text = text.strip()
    if not text:
        raise DataError("there is no question yet; write one and press Ask")
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"the question has {len(text):,} characters, over the limit of {MAX_CHARACTERS:,}; "
            "shorten it"
        )
    for token in image_tokens:
        if token in text:
            raise DataError(
                f"{token} stands for a picture and cannot be a part of the question; leave it out"
            )
    return text
