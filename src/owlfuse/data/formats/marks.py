"""Marks in texts, `<image>` and `<video>`: which of them stand for a picture or a video, and
which are words."""

from __future__ import annotations

import re
from typing import Any

from owlfuse.core.errors import DataError

Part = dict[str, Any]

MARKS = {"<image>": "image", "<|image|>": "image", "<video>": "video", "<|video|>": "video"}
"""What stands for a picture or a video in a text.

`<|image|>` is that of mPLUG-Owl2, mPLUG-Owl3 and DocOwl.
"""

MARK = re.compile(r"\\?(?:" + "|".join(map(re.escape, MARKS)) + ")")

OTHER_MARK = re.compile(
    r"<\|?(?:image|img|picture|video|vision|media)"
    r"(?:_start|_pad|_placeholder|_token|here)?[ _]?\d*\|?>|\[(?:img|image)\]",
    re.IGNORECASE,
)
"""Marks of other projects (`<image_1>`, `<|image_pad|>`, `<ImageHere>`): a picture that they
show must not be put elsewhere."""

PATH_IN_TEXT = re.compile(r"<img>[^<>]{1,500}\.(?:jpe?g|png|webp|gif|bmp)</img>", re.IGNORECASE)
"""A picture's path in a text, as Qwen-VL's first data have it."""

FIELDS = {"image": "'image' or 'images'", "video": "'video' or 'videos'"}


def split_marks(text: str) -> list[Part]:
    """A text as text parts and marks, `{"type": "image" | "video", "mark"}`; `\\<image>` is the
    word `<image>`."""
    if "<" not in text:
        return [{"type": "text", "text": text}] if text else []
    parts: list[Part] = []
    place = 0
    for found in MARK.finditer(text):
        add_text(parts, text[place : found.start()])
        if found[0].startswith("\\"):
            add_text(parts, found[0][1:])
        else:
            parts.append({"type": MARKS[found[0]], "mark": found[0]})
        place = found.end()
    add_text(parts, text[place:])
    return parts


def unescaped(text: str) -> str:
    """A text in which every mark is a word, `\\<image>` being one too."""
    return MARK.sub(lambda found: found[0].removeprefix("\\"), text) if "<" in text else text


def with_pictures(text: str, count: int, kinds: tuple[str, ...] = ("image",)) -> list[Part]:
    """The parts of a question that is asked with `count` pictures: they stand at its marks, or
    first where it has none.

    Args:
        kinds: of marks that show one of them, as `image`.

    Raises:
        DataError: marks of another number or kind.
    """
    parts = split_marks(text)
    marks = [part for part in parts if "mark" in part]
    if not marks:
        return [*({"type": "image"} for _ in range(count)), *parts]
    if len(marks) != count or not {part["type"] for part in marks} <= {*kinds}:
        first = marks[0]["mark"]
        raise DataError(
            f"the text has {len(marks)} {first} and {count} pictures are shown with it, expected "
            "a mark for each, or none; "
            f"write \\{first} where the word is meant"
        )
    return [{"type": "image"} if "mark" in part else part for part in parts]


def add_text(parts: list[Part], text: str) -> None:
    """Adds a text to the end of some parts, joined to a text that stands there."""
    if not text:
        return
    if parts and parts[-1]["type"] == "text":
        parts[-1] = {"type": "text", "text": parts[-1]["text"] + text}
    else:
        parts.append({"type": "text", "text": text})


class Shown:
    """The parts of one kind in a chat that may show a picture, or a video.

    Attributes:
        typed: parts that the data hold as such, with or without a picture.
        asked: marks in what the user says.
        others: marks in what others say.
    """

    def __init__(self, messages: list[dict[str, Any]], kind: str) -> None:
        self.typed: list[Part] = []
        self.asked: list[Part] = []
        self.others: list[Part] = []
        for message in messages:
            for part in message["content"]:
                if part["type"] == kind:
                    marks = self.asked if message["role"] == "user" else self.others
                    (marks if "mark" in part else self.typed).append(part)

    def wanting(self, count: int) -> int:
        """Of `count` pictures, how many no typed part shows."""
        own = [part.get("picture") for part in self.typed]
        return 0 if any(isinstance(picture, int) for picture in own) else count - own.count(None)


def settle_marks(
    messages: list[dict[str, Any]], listed: set[int], counts: dict[str, int], name: str
) -> list[str]:
    """Decides of each mark whether it is a picture, a video or a word, in place; pictures without a
    mark are put first.

    - Where all pictures have a part of their own or a mark in what the user says, other marks are
      words: an answer shows none.
    - `<image>` stands for a video where a record has videos alone and marks none of them otherwise
      (LLaVA-Video-178K).
    - Text parts of a list hold words, unless the record has pictures and no part or other mark that
      shows one.
    - Pictures that nothing shows come first in what the user first says, as trl has it.

    Args:
        listed: the numbers of the messages whose content was a list of parts.
        counts: how many pictures (`image`) and videos (`video`) the record has beside its turns.

    Returns:
        What was assumed, for the log.

    Raises:
        DataError: a mark in what the user says and no picture at all, or a picture that another
            project's mark shows.
    """
    notes: list[str] = []
    check_paths(messages, name)
    if not any(counts.values()) and all(
        part["type"] == "text" for message in messages for part in message["content"]
    ):
        return notes
    if any(counts.values()):
        for kind in counts:
            shown = Shown(messages, kind)
            if counts[kind] and not shown.typed and not shown.asked:
                read_listed(messages, listed, {"image", "video"} if not counts["image"] else {kind})
        if not counts["image"] and image_marks_show_videos(messages, counts["video"]):
            notes.append("<image> stands for a video, of which the record has some and no pictures")
    words: list[Part] = []
    unmarked: list[Part] = []
    for kind, count in counts.items():
        shown = Shown(messages, kind)
        wanting = shown.wanting(count)
        if len(shown.asked) == max(wanting, 0):
            words += shown.others
        elif not count and not shown.typed:
            raise DataError(
                f"sample {name} has {len(shown.asked)} {shown.asked[0]['mark']} placeholders and "
                f"0 {kind}s: name a file in "
                f"{FIELDS[kind]}, or write \\{shown.asked[0]['mark']} where the word is meant"
            )
        elif not (shown.typed or shown.asked or shown.others):
            unmarked += [{"type": kind} for _ in range(count)]
            notes.append(
                f"{'a picture' if kind == 'image' else 'a video'} that no mark shows is put first "
                "in the first question"
            )
    if unmarked:
        put_first(messages, unmarked, name)
    is_word = {id(part) for part in words}
    for message in messages:
        if any("mark" in part for part in message["content"]):
            message["content"] = settled(message["content"], is_word)
    return notes


def check_paths(messages: list[dict[str, Any]], name: str) -> None:
    """Raises DataError where the user's text holds a picture's path."""
    for message in messages:
        if message["role"] != "user":
            continue
        for part in message["content"]:
            if (
                part["type"] == "text"
                and "<" in part["text"]
                and (found := PATH_IN_TEXT.search(part["text"]))
            ):
                raise DataError(
                    f"sample {name} has {found[0][:100]} in its text; write <image> there, and "
                    "the path in 'image' or 'images'"
                )


def read_listed(messages: list[dict[str, Any]], listed: set[int], kinds: set[str]) -> None:
    """Marks in the text parts of the user's lists become marks, where they are of one of the
    `kinds`."""
    for number in listed:
        if messages[number]["role"] != "user":
            continue
        parts: list[Part] = []
        for part in messages[number]["content"]:
            if part["type"] != "text" or "<" not in part["text"]:
                parts.append(part)
                continue
            for piece in split_marks(part["text"]):
                if piece["type"] in kinds or piece["type"] == "text":
                    parts.append(piece)
                else:
                    add_text(parts, piece["mark"])
        messages[number]["content"] = parts


def image_marks_show_videos(messages: list[dict[str, Any]], videos: int) -> bool:
    """Whether the image marks of a record with `videos` and without pictures are its videos';
    they become so."""
    images, shown = Shown(messages, "image"), Shown(messages, "video")
    marks = images.asked + [part for part in images.typed if part.get("picture") is None]
    of_videos = len(shown.typed) + len(shown.asked)
    if not videos or not marks or (of_videos and of_videos + len(marks) != videos):
        return False
    for part in marks:
        part["type"] = "video"
    return True


def put_first(messages: list[dict[str, Any]], parts: list[Part], name: str) -> None:
    """Puts pictures and videos before the user's first text, on a line of their own. Raises
    DataError where a text has another project's mark."""
    asked = [message for message in messages if message["role"] == "user"]
    for message in asked:
        for part in message["content"]:
            if part["type"] == "text" and (found := OTHER_MARK.search(part["text"])):
                raise DataError(
                    f"sample {name} has {len(parts)} pictures or videos that no <image> or "
                    f"<video> shows, and {found[0]} in "
                    "its text; write <image> or <video> where each is shown"
                )
    if not asked:
        return
    content = asked[0]["content"]
    if content and content[0]["type"] == "text" and not content[0]["text"].startswith("\n"):
        content = [{"type": "text", "text": "\n" + content[0]["text"]}, *content[1:]]
    asked[0]["content"] = [*parts, *content]


def settled(parts: list[Part], is_word: set[int]) -> list[Part]:
    """Parts without marks: a mark is a word or a part that shows a picture."""
    read: list[Part] = []
    for part in parts:
        if part["type"] == "text":
            add_text(read, part["text"])
        elif id(part) in is_word:
            add_text(read, part["mark"])
        else:
            read.append({key: value for key, value in part.items() if key != "mark"})
    return read
