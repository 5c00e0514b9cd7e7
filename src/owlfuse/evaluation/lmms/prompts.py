"""What a task of lmms-eval asks -> messages and pictures, as the model's processor takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.checks import control_tokens, flatten
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.formats.marks import unescaped, with_pictures
from owlfuse.data.media.images import MAX_PIXELS, open_image, to_rgb

Message = dict[str, Any]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff", ".tif")


@dataclass
class Prompt:
    """A chat whose next turn is the assistant's.

    Args:
        name: for messages.
        messages: as `Sample` has them.
        pictures: RGB, in the order of their placeholders.
    """

    name: str
    messages: list[Message]
    pictures: list[Image.Image]


@dataclass(frozen=True)
class Opener:
    """Makes prompts, their pictures opened.

    Args:
        frames: of a video, spread evenly over it; each is a picture to the model.
    """

    frames: int = 8

    def question(self, name: str, text: str, visuals: Any) -> Prompt:
        """One user's turn. Pictures and videos stand where the text has `<image>` (or another mark,
        see `data.marks`), or before it where it has none; `\\<image>` is the word.

        Args:
            visuals: None, one, or a list (nested or not) of pictures of PIL and paths of pictures
                and videos.

        Raises:
            DataError: a count of placeholders that is neither 0 nor that of the pictures; what
                `shown` raises.
        """
        shown = [self.shown(name, visual) for visual in listed(visuals)]
        pictures = [picture for each in shown for picture in each]
        try:
            parts = with_pictures(text, len(shown), ("image", "video"))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        return Prompt(name, [user(filled(parts, [len(each) for each in shown]))], pictures)

    def chat(self, name: str, messages: Sequence[Message]) -> Prompt:
        """Messages as lmms-eval's `doc_to_messages` gives them: contents are lists of `{"type":
        "text", "text"}`, `{"type": "image", "url"}` and `{"type": "video", "url"}`, or a text.

        Raises:
            DataError: another part; what `shown` raises.
        """
        made: list[Message] = []
        pictures: list[Image.Image] = []
        for message in messages:
            content = message["content"]
            parts: list[Message] = []
            for part in (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            ):
                if part["type"] == "text":
                    parts.append({"type": "text", "text": unescaped(part["text"])})
                    continue
                if part["type"] not in ("image", "video"):
                    raise DataError(
                        f"{name}: a part of the type {part['type']}, and this model takes text, "
                        "images and videos"
                    )
                found = self.shown(name, part["url"])
                parts += placeholders(len(found))
                pictures += found
            made.append({"role": message["role"], "content": parts})
        return Prompt(name, made, pictures)

    def shown(self, name: str, visual: Any) -> list[Image.Image]:
        """The pictures that a visual of a task is: one, or a video's frames.

        Raises:
            DataError: sound, a file that cannot be read, a picture of more than `MAX_PIXELS`.
        """
        if isinstance(visual, Image.Image):
            if visual.width * visual.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: a picture has {visual.width * visual.height:,} pixels, over the "
                    f"limit of {MAX_PIXELS:,}"
                )
            return [to_rgb(visual)]
        if isinstance(visual, dict):
            # datasets give sound as an array
            kind = visual.get("type", "audio" if "array" in visual else "video")
            if kind not in ("image", "video"):
                raise DataError(
                    f"{name}: a visual of the type {kind}, and this model takes pictures and videos"
                )
            visual = visual.get("url") or visual.get("path")
        if not isinstance(visual, str | Path):
            raise DataError(
                f"{name}: a visual is a {type(visual).__name__}, expected a picture, or the path "
                "of one or of a video"
            )
        place = Path(visual).expanduser()
        if place.suffix.lower() in PICTURES:
            return [open_image(place.parent, place.name, name, MAX_PIXELS)]
        from owlfuse.data.media.video import VideoSampling, read_frames

        return read_frames(
            place.parent, place.name, name, VideoSampling(frames=self.frames), MAX_PIXELS
        )


def listed(visuals: Any) -> list[Any]:
    """None, one, or nested lists -> a list."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [one for part in visuals for one in listed(part)]
    return [visuals]


def user(content: list[Message]) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def placeholders(count: int) -> list[Message]:
    """So many image parts."""
    return [{"type": "image"} for _ in range(count)]


def filled(parts: list[Message], counts: list[int]) -> list[Message]:
    """Each image part as many times as its visual has pictures."""
    rest = iter(counts)
    return [
        one
        for part in parts
        for one in (placeholders(next(rest)) if part["type"] == "image" else [part])
    ]


def written(
    prompt: Prompt, processor: Any, answer: str | None = None, thinking: bool = False
) -> str:
    """A prompt as the chat template writes it, words hidden (see `data.words`): up to where the
    assistant answers, or with its answer.

    Args:
        thinking: it asks for a thought before the answer, where the template knows of thoughts.

    Raises:
        DataError: a chat that is none (see `data.checks.flatten`).
    """
    messages = prompt.messages
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    pictures: list[Any] = prompt.pictures  # read already
    special = control_tokens(processor.tokenizer, processor.image_token)
    flat = flatten(
        Sample(prompt.name, "lmms-eval", messages, pictures), special, processor.image_token
    )
    return render(processor.tokenizer, flat, answer is None, thinking)
