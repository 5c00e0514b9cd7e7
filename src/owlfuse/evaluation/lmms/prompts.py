"""What a task of lmms-eval asks -> messages and pictures, as the model's processor takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.checks import control_tokens, flatten, unwritten_roles
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.formats.marks import unescaped, with_pictures
from owlfuse.data.media.images import MAX_PIXELS, open_image, upright

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
class PromptMaker:
    """Makes prompts of what a task gives, their pictures opened.

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
                `open_visual` raises.
        """
        pictures_by_visual = [self.open_visual(name, visual) for visual in flattened(visuals)]
        try:
            # MMMU's texts name their pictures so, and lmms-eval gives them in that order.
            parts = with_pictures(
                text, len(pictures_by_visual), ("image", "video"), other_marks_are_words=True
            )
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        content: list[Message] = []
        visuals_left = iter(pictures_by_visual)
        for part in parts:
            if part["type"] == "image":
                content += image_parts(len(next(visuals_left)))
            else:
                content.append(part)
        pictures = list(chain.from_iterable(pictures_by_visual))
        return Prompt(name, [{"role": "user", "content": content}], pictures)

    def chat(self, name: str, messages: Sequence[Message]) -> Prompt:
        """Messages as lmms-eval's `doc_to_messages` gives them: contents are lists of `{"type":
        "text", "text"}`, `{"type": "image", "url"}` and `{"type": "video", "url"}`, or a text.

        Raises:
            DataError: another part; what `open_visual` raises.
        """
        turns: list[Message] = []
        pictures: list[Image.Image] = []
        for message in messages:
            content = message["content"]
            # doc_to_messages may give a text as it is
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            parts: list[Message] = []
            for part in content:
                if part["type"] == "text":
                    # `\<image>` is the word, as in the text of a question
                    parts.append({"type": "text", "text": unescaped(part["text"])})
                    continue
                if part["type"] not in ("image", "video"):
                    raise DataError(
                        f"{name}: a part of the type {part['type']}, and this model takes text, "
                        "images and videos"
                    )
                check_whole(part, name)
                opened = self.open_visual(name, part["url"])
                parts += image_parts(len(opened))
                pictures += opened
            turns.append({"role": message["role"], "content": parts})
        return Prompt(name, turns, pictures)

    def open_visual(self, name: str, visual: Any) -> list[Image.Image]:
        """Returns the pictures that a visual of a task is: one, or a video's frames.

        Raises:
            DataError: sound, a file that cannot be read, a picture of more than `MAX_PIXELS`.
        """
        if isinstance(visual, Image.Image):
            # a picture in memory, which open_image never checked
            if visual.width * visual.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: a picture has {visual.width * visual.height:,} pixels, over the "
                    f"limit of {MAX_PIXELS:,}"
                )
            return [upright(visual)]
        if isinstance(visual, dict):
            check_whole(visual, name)
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
        path = Path(visual).expanduser()
        if path.suffix.lower() in PICTURES:
            return [open_image(path.parent, path.name, name, MAX_PIXELS)]
        # PyAV is an optional extra
        from owlfuse.data.media.video import VideoSampling, read_frames

        sampling = VideoSampling(frames=self.frames)
        return read_frames(path.parent, path.name, name, sampling, MAX_PIXELS)


def check_whole(visual: Message, name: str) -> None:
    """Raises DataError for a visual of which a task asks for a piece, as `video_start`."""
    known = ("type", "url", "path", "array", "sampling_rate")
    for key in sorted(visual.keys() - {*known}):
        if visual[key] is not None:
            raise DataError(
                f"{name}: a visual has '{key}': {str(visual[key])[:80]}, which is not read; it "
                "would be shown whole"
            )


def flattened(visuals: Any) -> list[Any]:
    """Returns None, one visual, or nested lists of them as a list."""
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        return [visuals]
    flat: list[Any] = []
    for part in visuals:
        flat += flattened(part)
    return flat


def image_parts(count: int) -> list[Message]:
    """Returns so many image parts of a message."""
    return [{"type": "image"} for _ in range(count)]


def render_prompt(
    prompt: Prompt,
    processor: Any,
    answer: str | None = None,
    thinking: bool = False,
) -> str:
    """Returns a prompt as the chat template writes it, words hidden (see `data.words`): up to where
    the assistant answers, or with its answer.

    Args:
        thinking: it asks for a thought before the answer, where the template knows of thoughts.

    Raises:
        DataError: a chat that is none (see `data.checks.flatten`).
    """
    messages = prompt.messages
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    pictures: list[Any] = prompt.pictures  # opened already, where `Sample` names files
    special = control_tokens(processor.tokenizer, processor.image_token)
    sample = Sample(prompt.name, "lmms-eval", messages, pictures)
    flat = flatten(sample, special, processor.image_token)

    def asked(messages: list[Message]) -> str:
        return render(processor.tokenizer, messages, answer is None, thinking)

    text = asked(flat)
    if missing := unwritten_roles(flat, text, asked):
        raise DataError(
            f"{prompt.name}: it has {missing[0]}, which the chat template does not write"
        )
    return text
