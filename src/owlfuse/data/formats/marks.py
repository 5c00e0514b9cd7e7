"""Marks in texts, `<image>` and `<video>`: which of them show a picture or a video, and which are
words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from owlfuse.core.errors import DataError
from owlfuse.core.types import Message, Part, without_keys

# Marks of a picture or a video in a text.
# `<|image|>` is that of mPLUG-Owl2, mPLUG-Owl3 and DocOwl.
MARKS = {"<image>": "image", "<|image|>": "image", "<video>": "video", "<|video|>": "video"}

MARK = re.compile(r"\\?(?:" + "|".join(map(re.escape, MARKS)) + ")")

# Marks of other projects (`<image_1>`, `<|image_pad|>`, `<ImageHere>`): a picture that they show
# must not be put elsewhere.
OTHER_MARK = re.compile(
    r"<\|?(?:(?:start|begin)_of_)?(?:image|img|picture|video|vision|media)"
    r"(?:_start|_pad|_placeholder|_token|here|_soft_token)?[ _]?\d*\|?>|\[(?:img|image)\]",
    re.IGNORECASE,
)

# A picture's path in a text, as Qwen-VL's first data have it.
PATH_IN_TEXT = re.compile(r"<img>[^<>]{1,500}\.(?:jpe?g|png|webp|gif|bmp)</img>", re.IGNORECASE)


def split_marks(text: str) -> list[Part]:
    """Return a text as text parts and marks, `{"type": "image" | "video", "mark"}`; `\\<image>` is
    the word `<image>`."""
    if "<" not in text:
        return [{"type": "text", "text": text}] if text else []
    parts: list[Part] = []
    end = 0
    for match in MARK.finditer(text):
        add_text(parts, text[end : match.start()])
        if match[0].startswith("\\"):
            add_text(parts, match[0][1:])
        else:
            parts.append({"type": MARKS[match[0]], "mark": match[0]})
        end = match.end()
    add_text(parts, text[end:])
    return parts


def unescaped(text: str) -> str:
    """Return a text in which every mark is a word, `\\<image>` being one too."""
    if "<" not in text:
        return text
    return MARK.sub(lambda match: match[0].removeprefix("\\"), text)


def with_pictures(
    text: str,
    count: int,
    kinds: tuple[str, ...] = ("image",),
    other_marks_are_words: bool = False,
) -> list[Part]:
    """Return the parts of a question that is asked with `count` pictures: they are shown at its
    marks, or first where it has none.

    Args:
        kinds: of marks that show one of them, as `image`.
        other_marks_are_words: whether a text with another project's mark (`<image 1>`) may have its
            pictures first.

    Raises:
        DataError: marks of another number or kind, or another project's.
    """
    parts = split_marks(text)
    marks = [part for part in parts if "mark" in part]
    if not marks:
        mark = other_mark(text) if count else ""
        if mark and not other_marks_are_words:
            raise DataError(
                f"the text has {mark} and {count} pictures are shown with it; write "
                "<image> where each is shown"
            )
        return [*({"type": "image"} for _ in range(count)), *parts]
    mark_kinds = {part["type"] for part in marks}
    if len(marks) != count or not mark_kinds <= {*kinds}:
        first = marks[0]["mark"]
        raise DataError(
            f"the text has {len(marks)} {first} and {count} pictures are shown with it, expected "
            "a mark for each, or none; "
            f"write \\{first} where the word is meant"
        )
    return [{"type": "image"} if "mark" in part else part for part in parts]


def other_mark(text: str) -> str:
    """Return the first mark of another project in a text, "" where it has none."""
    for match in OTHER_MARK.finditer(text):
        # one of ours that is left in a text is a word
        if match[0] not in MARKS:
            return match[0]
    return ""


def add_text(parts: list[Part], text: str) -> None:
    """Add a text to the end of some parts, joined to a text that is the last of them."""
    if not text:
        return
    if parts and parts[-1]["type"] == "text":
        parts[-1] = {"type": "text", "text": parts[-1]["text"] + text}
    else:
        parts.append({"type": "text", "text": text})


def on_new_line(parts: list[Part]) -> list[Part]:
    """Return parts whose first text begins with a line break, to go behind pictures."""
    if not parts or parts[0]["type"] != "text" or parts[0]["text"].startswith("\n"):
        return parts
    return [{"type": "text", "text": "\n" + parts[0]["text"]}, *parts[1:]]


class VisualParts:
    """The parts of one kind in a chat that may show a picture, or a video.

    Attributes:
        typed: parts that the data hold as such, with or without a picture.
        user_marks: marks in the texts of the user.
        other_marks: marks in the texts of others.
    """

    def __init__(self, messages: list[Message], kind: str) -> None:
        self.typed: list[Part] = []
        self.user_marks: list[Part] = []
        self.other_marks: list[Part] = []
        for message in messages:
            marks = self.user_marks if message["role"] == "user" else self.other_marks
            for part in message["content"]:
                if part["type"] == kind:
                    (marks if "mark" in part else self.typed).append(part)

    def without_part(self, count: int) -> int:
        """Return how many of `count` pictures no typed part shows."""
        pictures = [part.get("picture") for part in self.typed]
        # By their indices parts may show a picture twice, or never.
        if any(isinstance(picture, int) for picture in pictures):
            return 0
        return count - pictures.count(None)


def settle_marks(
    messages: list[Message],
    listed: set[int],
    counts: dict[str, int],
    name: str,
) -> list[str]:
    """Decide of each mark whether it is a picture, a video or a word, in place; pictures without a
    mark are put first.

    - Where all pictures have a part of their own or a mark in a text of the user, other marks are
      words: an answer shows none.
    - `<image>` shows a video where a record has videos alone and marks none of them otherwise
      (LLaVA-Video-178K).
    - Text parts of a list hold words, unless the record has pictures and no part or other mark that
      shows one.
    - Pictures that nothing shows come first in the user's first message, as trl has it.

    Args:
        listed: the numbers of the messages whose content was a list of parts.
        counts: how many pictures (`image`) and videos (`video`) the record has beside its turns.

    Returns:
        Sentences about what was assumed, for the log.

    Raises:
        DataError: a mark in a text of the user and no picture at all, or a picture that another
            project's mark shows.
    """
    notes: list[str] = []
    for text in user_texts(messages):
        path = PATH_IN_TEXT.search(text)
        if path is None:
            continue
        raise DataError(
            f"sample {name} has {path[0][:100]} in its text; write <image> there, and the path in "
            "'image' or 'images'"
        )
    has_files = any(counts.values())
    # Most chats of text-only data: there is nothing to settle.
    if not has_files and not has_visual_part(messages):
        if any(other_mark(text) for text in user_texts(messages)):
            notes.append("another project's mark of a picture, in a record without any, is a word")
        return notes
    if has_files:
        for kind in counts:
            parts = VisualParts(messages, kind)
            if counts[kind] and not parts.typed and not parts.user_marks:
                # Without pictures, <image> may stand for a video.
                kinds = {kind} if counts["image"] else {"image", "video"}
                split_listed(messages, listed, kinds)
        if not counts["image"] and turn_image_marks_into_videos(messages, counts["video"]):
            notes.append("<image> stands for a video, of which the record has some and no pictures")
    words: list[Part] = []
    unmarked: list[Part] = []
    for kind, count in counts.items():
        parts = VisualParts(messages, kind)
        if len(parts.user_marks) == max(parts.without_part(count), 0):
            words += parts.other_marks
        # A mark of the user without any picture is a mistake in most data, and a word in few.
        elif not count and not parts.typed:
            mark = parts.user_marks[0]["mark"]
            raise DataError(
                f"sample {name} has {len(parts.user_marks)} {mark} placeholders and 0 {kind}s: "
                f"name a file in '{kind}' or '{kind}s', or write \\{mark} where the word is meant"
            )
        elif not (parts.typed or parts.user_marks or parts.other_marks):
            unmarked += [{"type": kind} for _ in range(count)]
            article = "a picture" if kind == "image" else "a video"
            notes.append(f"{article} that no mark shows is put first in the first question")
    if unmarked:
        put_first(messages, unmarked, name)
    # By identity: two marks of one kind are equal as dictionaries.
    is_word = {id(part) for part in words}
    for message in messages:
        if any("mark" in part for part in message["content"]):
            message["content"] = without_marks(message["content"], is_word)
    return notes


def has_visual_part(messages: list[Message]) -> bool:
    """Whether a message has another part than texts."""
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                return True
    return False


def user_texts(messages: list[Message]) -> Iterator[str]:
    """Yields the texts of the user."""
    for message in messages:
        if message["role"] == "user":
            for part in message["content"]:
                yield part.get("text", "")


def split_listed(messages: list[Message], listed: set[int], kinds: set[str]) -> None:
    """Split the text parts of the user's lists at their marks of some kinds, in place."""
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


def turn_image_marks_into_videos(messages: list[Message], videos: int) -> bool:
    """Make the image marks of a record with `videos` and without pictures marks of its videos,
    where they are as many.

    Returns whether they were.
    """
    images, clips = VisualParts(messages, "image"), VisualParts(messages, "video")
    marks = list(images.user_marks)
    for part in images.typed:
        if part.get("picture") is None:
            marks.append(part)
    if not videos or not marks:
        return False
    video_parts = len(clips.typed) + len(clips.user_marks)
    if video_parts and video_parts + len(marks) != videos:
        return False
    for part in marks:
        part["type"] = "video"
    return True


def put_first(messages: list[Message], parts: list[Part], name: str) -> None:
    """Put pictures and videos before the user's first text, which goes on a new line. Raises
    DataError where a text has another project's mark."""
    # A picture that another project's mark shows in the middle must not be put first.
    check_other_marks(messages, len(parts), name)
    for message in messages:
        if message["role"] == "user":
            message["content"] = [*parts, *on_new_line(message["content"])]
            return


def check_other_marks(messages: list[Message], count: int, name: str) -> None:
    """Raise DataError where a text of the user has another project's mark, and `count` pictures or
    videos have none."""
    for text in user_texts(messages):
        mark = other_mark(text)
        if mark:
            raise DataError(
                f"sample {name} has {count} pictures or videos that no <image> or <video> shows, "
                f"and {mark} in its text; write <image> or <video> where each is shown"
            )


def without_marks(parts: list[Part], is_word: set[int]) -> list[Part]:
    """Return parts in which each mark is a word or a part that shows a picture.

    Args:
        is_word: ids of the parts that are words.
    """
    plain: list[Part] = []
    for part in parts:
        if part["type"] == "text":
            add_text(plain, part["text"])
        elif id(part) in is_word:
            add_text(plain, part["mark"])
        else:
            plain.append(without_keys(part, ["mark"]))
    return plain
