"""Turns as the formats write them -> messages of text and image parts, and the pictures that
they show."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from owlfuse.core.errors import DataError
from owlfuse.core.types import Note
from owlfuse.data.formats.marks import settle_marks, split_marks, unescaped
from owlfuse.data.formats.turn_keys import (
    CALL_ROLES,
    LEARN_KEYS,
    NOT_LEARN_KEYS,
    REFUSED_KEYS,
    ROLES,
    SYSTEM_KEYS,
    THOUGHT_KEYS,
    brief,
    extras_of,
    is_absent,
    one_of,
    tool_calls_of,
)

PICTURE_KEYS = ("image_url", "image", "bytes", "path", "url", "base64")
"""Where an image part holds its picture; without one of them it shows the next of the sample's
pictures."""

VIDEO_KEYS = ("video", "video_url", "bytes", "path", "url")

PAIRS = (
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "assistant"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("input", "output"),
)
"""Keys of an element of a chat that is a question with its answer (the_cauldron, FineVision,
xtuner)."""

SIMPLE_TURNS = ({"from", "value"}, {"role", "content"})
"""The keys of a turn that has nothing beside its role and its content."""

PAIR_KEYS = frozenset(key for pair in PAIRS for key in pair)

TURN_KEYS = frozenset(
    (
        *("from", "role", "value", "content", "image", "images", "video", "videos"),
        *("tool_calls", "function_call", "tool_call_id", "name"),
        *(*LEARN_KEYS, *NOT_LEARN_KEYS, *THOUGHT_KEYS, *SYSTEM_KEYS, *REFUSED_KEYS),
    )
)
"""Keys of a turn that are used or refused."""

EXPECTED_TURN = f"expected from or role ({', '.join(ROLES)}) and value or content"

PART_KEYS = frozenset(("type", "text", "index", *PICTURE_KEYS, *VIDEO_KEYS, *THOUGHT_KEYS))
PART_REFUSED = (
    *(
        "video_start",
        "video_end",
        "start",
        "end",
        "start_time",
        "end_time",
        "clip",
        "bbox",
        "crop",
        "page",
    ),
    *("rotation", "audio", "citations"),
)
"""Keys of an image or video part that choose a piece of it, which is not done."""


@dataclass
class Chat:
    """Turns as a `Sample` has them."""

    messages: list[dict[str, Any]]
    images: list[str | bytes]
    videos: list[str | bytes]
    notes: list[Note]


def chat(
    turns: Sequence[Any], pictures: list[str | bytes], name: str, videos: Sequence[str | bytes] = ()
) -> Chat:
    """Turns -> messages as `Sample` has them, the pictures in the order of their image parts, and
    the videos likewise.

    A turn has a role (`from` or `role`, see ROLES) and a content (`value` or `content`), or is a
    question with its answer (see PAIRS). A content is a text with `<image>` and `<video>` marks
    (see `settle_marks`), or a list of parts. Text parts are `{"type": "text", "text"}`; image parts
    are OpenAI's `{"type": "image_url", "image_url": {"url"}}` or Hugging Face's `{"type": "image",
    "image" | "path" | "url"}`. An image part or mark without a picture of its own shows the next of
    `pictures`, or the one of its `index`. Video parts are `{"type": "video", "video" | "path" |
    "url"}`. The other keys of a turn are told in `turn_keys`; what is not used is noted.

    Raises:
        DataError: names the sample `name` and the turn that is wrong.
    """
    messages: list[dict[str, Any]] = []
    listed: set[int] = set()
    unused: set[str] = set()
    for number, turn in plain_turns(turns, name):
        try:
            message = message_of(turn, name, unused)
            if isinstance(message["content"], list):
                listed.add(len(messages))
                message["content"] = [part_of(part, name, unused) for part in message["content"]]
                take_thoughts(message, name)
            else:
                message["content"] = split_marks(message["content"])
            if isinstance(turn, dict) and len(turn) > 2:
                show_own_pictures(turn, message, name)
        except DataError as error:
            raise of_turn(error, number) from None
        if not joined_to_answer(messages, message):
            messages.append(message)
    assumed = settle_marks(messages, listed, {"image": len(pictures), "video": len(videos)}, name)
    for number in listed:  # only now is it known that what is left in their texts are words
        for part in messages[number]["content"]:
            if part["type"] == "text":
                part["text"] = unescaped(part["text"])
    shown: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        for part in message["content"]:
            if part["type"] in shown:
                shown[part["type"]].append(part.pop("picture", None))
    notes = [Note("unused", key) for key in sorted(unused)] + [
        Note("assumed", text) for text in assumed
    ]
    return Chat(
        messages,
        resolve(shown["image"], pictures, name, "image"),
        resolve(shown["video"], list(videos), name, "video"),
        notes,
    )


def of_turn(error: DataError, number: int) -> DataError:
    """An error that says in which turn it is, from 1."""
    error.args = (f"{error} (turn {number})",)
    return error


def plain_turns(turns: Sequence[Any], name: str) -> list[tuple[int, Any]]:
    """Turns with a role each, and the numbers from 1 of those that they come from: a system text
    that the first turn holds is one of its own, a question with its answer two."""
    plain: list[tuple[int, Any]] = []
    system: Any = None
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or turn.keys() in SIMPLE_TURNS:
            plain.append((number, turn))
            continue
        try:
            key, text = one_of(turn, SYSTEM_KEYS, name, "a turn")
            if key is not None and text != system:
                if number > 1 or not isinstance(text, str):
                    raise DataError(
                        f"sample {name}: a turn has '{key}': {brief(text)}, expected a text in "
                        "the first turn"
                    )
                system = text
                plain.append((number, {"role": "system", "content": text}))
            plain += [(number, each) for each in question_and_answer(turn, name)]
        except DataError as error:
            raise of_turn(error, number) from None
    return plain


def question_and_answer(turn: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The two turns of one that is a question with its answer (see PAIRS); another as it is.

    Raises DataError.
    """
    pair = None
    if turn.get("from") is None and turn.get("role") is None:
        pair = next((keys for keys in PAIRS if keys[0] in turn and keys[1] in turn), None)
    if pair is None:
        return [turn]
    rest = {key: value for key, value in turn.items() if key not in pair}
    if left := sorted(key for key in rest if key in PAIR_KEYS and not is_absent(rest[key])):
        raise DataError(
            f"sample {name}: a turn has '{pair[0]}', '{pair[1]}' and '{left[0]}', expected a "
            "question and an answer"
        )
    pictures: dict[str, Any] = {
        key: rest.pop(key) for key in ("image", "images", "video", "videos") if key in rest
    }
    asked: dict[str, Any] = {"role": "user", "content": turn[pair[0]], **pictures}
    return [asked, {"role": "assistant", "content": turn[pair[1]], **rest}]


def joined_to_answer(messages: list[dict[str, Any]], message: dict[str, Any]) -> bool:
    """Joins tool calls that have a turn of their own to the assistant's turn before them, as one
    answer, where they can be."""
    if not messages or "tool_calls" not in message or message["content"]:
        return False
    last = messages[-1]
    if (
        last["role"] != "assistant"
        or last.get("supervised") != message.get("supervised")
        or "reasoning_content" in message
    ):
        return False
    last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
    return True


def take_thoughts(message: dict[str, Any], name: str) -> None:
    """Parts that hold a thought become the message's `reasoning_content`.

    Raises DataError outside an answer.
    """
    thoughts = [part["thought"] for part in message["content"] if part["type"] == "thought"]
    if not thoughts:
        return
    if message["role"] != "assistant" or "reasoning_content" in message:
        raise DataError(
            f"sample {name}: a turn of the {message['role']} has a part with a thought, expected "
            "one in an answer"
        )
    message["reasoning_content"] = "".join(thoughts)
    message["content"] = [part for part in message["content"] if part["type"] != "thought"]


def show_own_pictures(turn: dict[str, Any], message: dict[str, Any], name: str) -> None:
    """Pictures and videos that a turn itself names are shown by its marks, or come first in it.

    Raises DataError.
    """
    for kind, own in (("image", pictures_of(turn, name)), ("video", videos_of(turn, name))):
        if not own:
            continue
        places = [
            part
            for part in message["content"]
            if part["type"] == kind and part.get("picture") is None
        ]
        if not places and not any(part["type"] == kind for part in message["content"]):
            content = message["content"]
            if content and content[0]["type"] == "text" and not content[0]["text"].startswith("\n"):
                content = [{"type": "text", "text": "\n" + content[0]["text"]}, *content[1:]]
            places = [{"type": kind} for _ in own]
            message["content"] = [*places, *content]
        if len(places) != len(own):
            raise DataError(
                f"sample {name}: a turn has {len(own)} {kind}s and {len(places)} <{kind}> "
                "placeholders"
            )
        for part, picture in zip(places, own, strict=True):
            part.pop("mark", None)
            part["picture"] = picture


def resolve(shown: list[Any], pictures: list[Any], name: str, kind: str) -> list[Any]:
    """Each image or video part's picture: its own, that of its index, or the next of the sample's.
    Where no part has its own, the sample's are taken as they are, and whoever encodes it counts
    them."""
    if all(picture is None for picture in shown):
        return pictures
    rest = iter(pictures)
    found: list[Any] = []
    for picture in shown:
        if isinstance(picture, int) and not 0 <= picture < len(pictures):
            raise DataError(
                f"sample {name}: an {kind} part has index {picture}, and there are "
                f"{len(pictures)} {kind}s"
            )
        taken = (
            pictures[picture]
            if isinstance(picture, int)
            else next(rest, None)
            if picture is None
            else picture
        )
        if taken is None:
            raise DataError(
                f"sample {name} has more {kind} parts without a file than its {len(pictures)} "
                f"{kind}s"
            )
        found.append(taken)
    left = len(list(rest))
    if left and not any(isinstance(picture, int) for picture in shown):
        raise DataError(
            f"sample {name} has {len(shown)} {kind} parts and {left} {kind}s that none of them "
            "shows"
        )
    return found


def message_of(turn: Any, name: str, unused: set[str]) -> dict[str, Any]:
    """Role, content (a text or a list) and the other keys of one turn, in either spelling. Raises
    DataError.

    Args:
        unused: takes what of the turn is not used.
    """
    if not isinstance(turn, dict):
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN}")
    if turn.keys() in SIMPLE_TURNS:  # most turns of most data: nothing else is to be looked for
        role, content = (
            turn.values() if next(iter(turn)) in ("from", "role") else reversed(turn.values())
        )
        if isinstance(role, str) and isinstance(content, str) and (read := ROLES.get(role.lower())):
            return {"role": read, "content": content}
    if (found := turn.keys() - TURN_KEYS) and (
        found := {key for key in found if not is_absent(turn[key])}
    ):
        unused |= {f"a turn's '{key}'" for key in found}
    role = turn["from"] if turn.get("from") is not None else turn.get("role")
    _, content = one_of(turn, ("value", "content"), name, "a turn")
    if content is None:
        content = turn["value"] if turn.get("value") is not None else turn.get("content")
    role = role.lower().replace("-", "_") if isinstance(role, str) else role
    if isinstance(role, str) and role in CALL_ROLES and isinstance(content, str | list | dict):
        extras = extras_of(turn, "assistant", name) | {"tool_calls": tool_calls_of(content, name)}
        return {"role": "assistant", "content": [], **extras}
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN}")
    extras = extras_of(turn, ROLES[role], name)
    if content is None and "tool_calls" in extras:
        content = []
    if not isinstance(content, str | list):
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN}")
    return {"role": ROLES[role], "content": content, **extras}


def part_of(part: Any, name: str, unused: set[str]) -> dict[str, Any]:
    """A part of a content -> `{"type": "text", "text"}`, `{"type": "image"}` with its `picture`
    where it has one, a video likewise, or `{"type": "thought", "thought"}`. Raises DataError."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and (found := part.keys() - PART_KEYS):
        for key in sorted(key for key in found if not is_absent(part[key])):
            if key in PART_REFUSED and kind != "text":
                raise DataError(
                    f"sample {name}: a part is {brief(part)}; its '{key}' chooses a piece, and a "
                    "part is shown whole"
                )
            unused.add(f"a part's '{key}'")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("thinking", "reasoning"):
        thought = next(
            (part[key] for key in (*THOUGHT_KEYS, "text") if isinstance(part.get(key), str)), None
        )
        if thought is not None:
            return {"type": "thought", "thought": thought}
    if kind in ("video", "video_url"):
        return video_part(part, name)
    if kind not in ("image", "image_url", "input_image"):
        raise DataError(
            f"sample {name}: a part is {brief(part)}, expected a text with its text, an image or "
            "a video"
        )
    for key in PICTURE_KEYS:
        value = part.get(key)
        if value is not None:
            if key == "base64":
                value = f"data:;base64,{value}"
            return {"type": "image", "picture": picture_of(value, name)}
    if kind != "image":
        raise DataError(f"sample {name}: a part is {brief(part)}, expected an image_url")
    index = part.get("index")
    return {"type": "image", "picture": index} if type(index) is int else {"type": "image"}


def video_part(part: dict[str, Any], name: str) -> dict[str, Any]:
    """`{"type": "video"}`, with its file as `picture` where it has one. Raises DataError."""
    value = next((part[key] for key in VIDEO_KEYS if part.get(key) is not None), None)
    if isinstance(value, list):
        raise DataError(
            f"sample {name}: a video part is {brief(part)}, a list of frames; give each as an "
            "image part"
        )
    return (
        {"type": "video"}
        if value is None
        else {"type": "video", "picture": picture_of(value, name, "video")}
    )


def videos_of(record: dict[str, Any], name: str) -> list[str | bytes]:
    """The videos in a record's or a turn's `video` or `videos`, as `pictures_of` reads pictures.

    Raises DataError.
    """
    return files_of(record, ("video", "videos"), name)


def pictures_of(record: dict[str, Any], name: str) -> list[str | bytes]:
    """The pictures in a record's or a turn's `image` or `images`: one or a list of paths, data:
    URIs, bytes or `{"bytes", "path"}`.

    Raises:
        DataError: something else, or both fields.
    """
    return files_of(record, ("image", "images"), name)


def files_of(record: dict[str, Any], keys: tuple[str, str], name: str) -> list[str | bytes]:
    """The pictures or videos under one of two keys. Raises DataError."""
    there = [key for key in keys if key in record and not is_absent(record[key])]
    if not there:
        return []
    if len(there) == 2:
        raise DataError(f"sample {name} has '{keys[0]}' and '{keys[1]}', expected one of them")
    value = record[there[0]]
    return [
        picture_of(file, name, there[0])
        for file in (value if isinstance(value, list | tuple) else [value])
    ]


def picture_of(value: Any, name: str, key: str = "image") -> str | bytes:
    """A path as it is, a data: URI or bytes as bytes; of `{"bytes", "path"}` the first that is
    there.

    Raises:
        DataError: a URL, nothing, or something else.
    """
    what = "video" if key.startswith("video") else "image"
    if isinstance(value, dict):
        for piece in value.keys() & {*PART_REFUSED}:
            if not is_absent(value[piece]):
                raise DataError(
                    f"sample {name}: '{key}' is {brief(value)}; its '{piece}' chooses a piece, "
                    "and it is shown whole"
                )
        value = next(
            (value[k] for k in ("bytes", "url", "path") if value.get(k) is not None), value
        )
    if isinstance(value, bytes | bytearray | memoryview) and len(value):
        return bytes(value)
    if isinstance(value, str) and value[:5].lower() == "data:":
        return data_uri(value, name, what)
    if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise DataError(
            f"sample {name}: {what} {value.split()[0][:80]} is a URL; fetch it, and name its path "
            "below the image root"
        )
    if isinstance(value, str) and value:
        return value
    found = "empty" if isinstance(value, str | bytes) else brief(value)
    raise DataError(
        f"sample {name}: '{key}' is {found}, expected a path or a list of paths, a data: URI or "
        "bytes"
    )


def data_uri(uri: str, name: str, what: str) -> bytes:
    """The bytes of `data:image/png;base64,...` (RFC 2397). Raises DataError."""
    header, comma, payload = uri.partition(",")
    try:
        encoded = unquote_to_bytes(payload)
        if header.lower().endswith(";base64"):
            encoded = base64.b64decode(re.sub(rb"\s", b"", encoded), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"sample {name}: the {what}'s data: URI {uri[:40]}... is not base64: {error}"
        ) from error
    if not comma or not encoded:
        raise DataError(f"sample {name}: the {what}'s data: URI {uri[:40]} holds no data")
    return encoded


def caption_messages(
    images: int,
    caption: Any,
    instructions: Sequence[str],
    identity: str,
    name: str,
    videos: int = 0,
) -> list[dict[str, Any]]:
    """A chat that asks for a caption: the images, the videos, one of the `instructions` (none:
    nothing more), and the caption. Which instruction is a hash of `identity`, so that it is the
    same in every run and whatever stands around the sample.

    Raises:
        DataError: a caption that is no text.
    """
    if not isinstance(caption, str):
        raise DataError(f"sample {name}: the caption is {brief(caption)}, expected a text")
    asked: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    asked += [{"type": "video"} for _ in range(videos)]
    if instructions:
        number = int.from_bytes(
            hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8], "little"
        )
        asked.append({"type": "text", "text": f"\n{instructions[number % len(instructions)]}"})
    answer = [{"type": "text", "text": unescaped(caption)}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
