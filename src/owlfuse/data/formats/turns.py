"""Turns as the formats write them become messages of text and image parts, and the pictures that
they show."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from owlfuse.core.errors import DataError
from owlfuse.core.types import JsonObject, Media, Message, Note
from owlfuse.data.formats.marks import (
    check_other_marks,
    on_new_line,
    settle_marks,
    split_marks,
    unescaped,
)
from owlfuse.data.formats.turn_keys import (
    CALL_ROLES,
    IMAGES,
    LEARN_KEYS,
    NOT_LEARN_KEYS,
    QUESTION_REFUSED,
    REFUSED_KEYS,
    ROLES,
    SYSTEM_KEYS,
    THOUGHT_KEYS,
    VIDEOS,
    brief,
    extras_of,
    is_absent,
    present_keys,
    single_value,
    tool_calls_of,
)

# Keys of an image part that hold its picture; without one of them it shows the next of the sample's
# pictures.
PICTURE_KEYS = ("image_url", "image", "bytes", "path", "url", "base64")

VIDEO_KEYS = ("video", "video_url", "bytes", "path", "url")

# Keys of an element of a chat that is a question with its answer (the_cauldron, FineVision,
# xtuner).
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

# The keys of a turn that has nothing beside its role and its content.
SIMPLE_TURNS = ({"from", "value"}, {"role", "content"})

PAIR_KEYS = frozenset(key for pair in PAIRS for key in pair)

# Keys of a turn that are used or refused.
TURN_KEYS = frozenset(
    {
        "from",
        "role",
        "value",
        "content",
        "tool_calls",
        "function_call",
        "tool_call_id",
        "name",
        *IMAGES,
        *VIDEOS,
        *LEARN_KEYS,
        *NOT_LEARN_KEYS,
        *THOUGHT_KEYS,
        *SYSTEM_KEYS,
        *REFUSED_KEYS,
    }
)

EXPECTED_TURN = f"expected from or role ({', '.join(ROLES)}) and value or content"

PART_KEYS = frozenset(("type", "text", "index", *PICTURE_KEYS, *VIDEO_KEYS, *THOUGHT_KEYS))
# Keys of an image or video part that choose a piece of it, which is not done.
PART_REFUSED = (
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
    "rotation",
    "audio",
    "citations",
)


def read_turns(
    turns: Sequence[Any],
    pictures: list[Media],
    videos: list[Media],
    name: str,
) -> tuple[list[Message], list[Media], list[Media], list[Note]]:
    """Return turns as messages of a `Sample`, the pictures in the order of their image parts, the
    videos likewise, and notes of what was not used or was assumed.

    A turn has a role (`from` or `role`, see ROLES) and a content (`value` or `content`), or is a
    question with its answer (see PAIRS). A content is a text with `<image>` and `<video>` marks
    (see `settle_marks`), or a list of parts. Text parts are `{"type": "text", "text"}`; image parts
    are OpenAI's `{"type": "image_url", "image_url": {"url"}}` or Hugging Face's `{"type": "image",
    "image" | "path" | "url"}`. An image part or mark without a picture of its own shows the next of
    `pictures`, or the one of its `index`. Video parts are `{"type": "video", "video" | "path" |
    "url"}`. For the other keys of a turn see `turn_keys`; unused ones are noted.

    Raises:
        DataError: names the sample `name` and the turn that is wrong.
    """
    messages: list[Message] = []
    listed: set[int] = set()
    unused: set[str] = set()
    assumed: list[str] = []
    for number, turn in plain_turns(turns, name):
        try:
            message = read_message(turn, name, unused)
            if isinstance(message["content"], list):
                # A text in a list of parts may hold `<image>` as a word, so its marks are settled
                # later.
                listed.add(len(messages))
                message["content"] = [read_part(part, name, unused) for part in message["content"]]
                move_thoughts(message, name)
            else:
                message["content"] = split_marks(message["content"])
            # Turns of two keys, role and content, have no pictures of their own.
            if isinstance(turn, dict) and len(turn) > 2:
                assumed += show_turn_pictures(turn, message, name)
        except DataError as error:
            raise with_turn(error, number) from None
        if not join_tool_calls(messages, message):
            messages.append(message)
    assumed += settle_marks(messages, listed, {"image": len(pictures), "video": len(videos)}, name)
    # Only now is it known that the marks that remain in the texts of lists are words.
    for number in listed:
        for part in messages[number]["content"]:
            if part["type"] == "text":
                part["text"] = unescaped(part["text"])
    shown: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        for part in message["content"]:
            if part["type"] in shown:
                shown[part["type"]].append(part.pop("picture", None))
    notes = [Note("unused", key) for key in sorted(unused)]
    notes += [Note("assumed", text) for text in dict.fromkeys(assumed)]
    images = resolve(shown["image"], pictures, name, "image")
    return messages, images, resolve(shown["video"], videos, name, "video"), notes


def with_turn(error: DataError, number: int) -> DataError:
    """Return an error whose message says in which turn it is, from 1."""
    error.args = (f"{error} (turn {number})",)
    return error


def plain_turns(turns: Sequence[Any], name: str) -> list[tuple[int, Any]]:
    """Return turns with a role each, and the numbers from 1 of those that they come from: a system
    text in the first turn becomes a turn, and a question with its answer two."""
    plain: list[tuple[int, Any]] = []
    system: Any = None
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or turn.keys() in SIMPLE_TURNS:
            plain.append((number, turn))
            continue
        try:
            key, text = single_value(turn, SYSTEM_KEYS, name, "a turn")
            if key is not None and text != system:
                if number > 1 or not isinstance(text, str):
                    raise DataError(
                        f"sample {name}: a turn has '{key}': {brief(text)}, expected a text in "
                        "the first turn"
                    )
                system = text
                plain.append((number, {"role": "system", "content": text}))
            for plain_turn in question_and_answer(turn, name):
                plain.append((number, plain_turn))
        except DataError as error:
            raise with_turn(error, number) from None
    return plain


def question_and_answer(turn: JsonObject, name: str) -> list[JsonObject]:
    """Return the two turns of one that is a question with its answer (see PAIRS); another turn as
    it is.

    Raises DataError.
    """
    pair = None
    if turn.get("from") is None and turn.get("role") is None:
        pair = next((keys for keys in PAIRS if keys[0] in turn and keys[1] in turn), None)
    if pair is None:
        return [turn]
    question: JsonObject = {"role": "user", "content": turn[pair[0]]}
    answer: JsonObject = {"role": "assistant", "content": turn[pair[1]]}
    for key in present_keys(turn, QUESTION_REFUSED):
        raise DataError(
            f"sample {name}: a turn has '{key}' beside '{pair[0]}': write it into the question, it "
            "would be left out"
        )
    for key in sorted(turn.keys() - {*pair}):
        if key in PAIR_KEYS and not is_absent(turn[key]):
            raise DataError(
                f"sample {name}: a turn has '{pair[0]}', '{pair[1]}' and '{key}', expected a "
                "question and an answer"
            )
        is_visual = key in (*IMAGES, *VIDEOS)
        # Pictures belong to the question; weights, thoughts and tool calls to the answer.
        (question if is_visual else answer)[key] = turn[key]
    return [question, answer]


def join_tool_calls(messages: list[Message], message: Message) -> bool:
    """Join tool calls in a turn without a text to the assistant's turn before them, as one answer.

    Returns whether they could be joined.
    """
    if not messages or "tool_calls" not in message or message["content"]:
        return False
    last = messages[-1]
    if last["role"] != "assistant" or "reasoning_content" in message:
        return False
    # One answer is learned from as a whole or not at all.
    if last.get("supervised") != message.get("supervised"):
        return False
    last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
    return True


def move_thoughts(message: Message, name: str) -> None:
    """Move parts that hold a thought into the message's `reasoning_content`.

    Raises DataError outside an answer.
    """
    thoughts, parts = [], []
    for part in message["content"]:
        if part["type"] == "thought":
            thoughts.append(part["thought"])
        else:
            parts.append(part)
    if not thoughts:
        return
    if message["role"] != "assistant" or "reasoning_content" in message:
        raise DataError(
            f"sample {name}: a turn of the {message['role']} has a part with a thought, expected "
            "one in an answer"
        )
    message["reasoning_content"] = "".join(thoughts)
    message["content"] = parts


def show_turn_pictures(turn: JsonObject, message: Message, name: str) -> list[str]:
    """Show pictures and videos that a turn names at its marks, or first in it; return sentences
    about what was assumed.

    Raises DataError.
    """
    assumed = []
    for kind, keys in (("image", IMAGES), ("video", VIDEOS)):
        pictures = files_of(turn, keys, name)
        if not pictures:
            continue
        parts = [part for part in message["content"] if part["type"] == kind]
        empty_parts = [part for part in parts if part.get("picture") is None]
        if not parts:
            check_other_marks([message], len(pictures), name)
            assumed.append("what a turn shows and no mark of it does is put first in the turn")
            empty_parts = [{"type": kind} for _ in pictures]
            message["content"] = [*empty_parts, *on_new_line(message["content"])]
        if len(empty_parts) != len(pictures):
            raise DataError(
                f"sample {name}: a turn has {len(pictures)} {kind}s and {len(empty_parts)} "
                f"<{kind}> placeholders"
            )
        for part, picture in zip(empty_parts, pictures, strict=True):
            # A part with a picture is no mark any more, and needs no settling.
            part.pop("mark", None)
            part["picture"] = picture
    return assumed


def resolve(
    shown: list[Any],
    pictures: list[Any],
    name: str,
    kind: str,
) -> list[Any]:
    """Return the picture of each image or video part: its own, that of its index, or the next of
    the sample's. Where no part has its own, all of the sample's are returned, and the encoder
    compares their number with that of the parts."""
    if all(picture is None for picture in shown):
        return pictures
    unshown = iter(pictures)
    resolved: list[Any] = []
    for picture in shown:
        if isinstance(picture, int):
            if not 0 <= picture < len(pictures):
                raise DataError(
                    f"sample {name}: an {kind} part has index {picture}, and there are "
                    f"{len(pictures)} {kind}s"
                )
            picture = pictures[picture]
        elif picture is None:
            picture = next(unshown, None)
        if picture is None:
            raise DataError(
                f"sample {name} has more {kind} parts without a file than its {len(pictures)} "
                f"{kind}s"
            )
        resolved.append(picture)
    remaining = len(list(unshown))
    # With indices, pictures may be shown twice or never.
    if remaining and not any(isinstance(picture, int) for picture in shown):
        raise DataError(
            f"sample {name} has {len(shown)} {kind} parts and {remaining} {kind}s that none of "
            "them shows"
        )
    return resolved


def read_message(turn: Any, name: str, unused: set[str]) -> JsonObject:
    """Return role, content (a text or a list) and the other keys of one turn, in either spelling.
    Raises DataError.

    Args:
        unused: a set to which unused keys are added.
    """
    if not isinstance(turn, dict):
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN}")
    # Most turns of most data have no other key that would have to be looked at.
    if turn.keys() in SIMPLE_TURNS:
        role_first = next(iter(turn)) in ("from", "role")
        role, content = turn.values() if role_first else reversed(turn.values())
        known_role = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known_role and isinstance(content, str) and not PARTS_IN_TEXT.match(content):
            return {"role": known_role, "content": content}
    for key in present_keys(turn, turn.keys() - TURN_KEYS):
        unused.add(f"a turn's '{key}'")
    role = role_of(turn)
    _, content = single_value(turn, ("value", "content"), name, "a turn")
    if content is None:
        # an empty text, which says nothing but is a content
        content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if isinstance(content, str):
        content = parts_of_text(content)
    if role in CALL_ROLES and isinstance(content, str | list | dict):
        extras = extras_of(turn, "assistant", name) | {"tool_calls": tool_calls_of(content, name)}
        return {"role": "assistant", "content": [], **extras}
    if role not in ROLES:
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN}")
    extras = extras_of(turn, ROLES[role], name)
    if content is None and "tool_calls" in extras:
        content = []
    if not isinstance(content, str | list):
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN}")
    return {"role": ROLES[role], "content": content, **extras}


# The beginning of a list of parts that is written as JSON.
PARTS_IN_TEXT = re.compile(r"\s*\[\s*\{")


def parts_of_text(text: str) -> str | list[Any]:
    """Return the parts of a content whose list of parts is stored as JSON, since a table's column
    has one type; another text as it is, as boxes in JSON that are an answer."""
    if not PARTS_IN_TEXT.match(text):
        return text
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        return text
    are_parts = all(
        isinstance(part, dict) and "type" in part and part.keys() <= PART_KEYS for part in parts
    )
    return parts if are_parts else text


def role_of(turn: JsonObject) -> str | None:
    """Return a turn's role in the spelling of ROLES and CALL_ROLES, or None where it has none."""
    role = turn["from"] if turn.get("from") is not None else turn.get("role")
    return role.lower().replace("-", "_") if isinstance(role, str) else None


def read_part(part: Any, name: str, unused: set[str]) -> JsonObject:
    """Return a part of a content as `{"type": "text", "text"}`, `{"type": "image"}` with its
    `picture` where it has one, a video likewise, or `{"type": "thought", "thought"}`. Raises
    DataError."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict):
        for key in sorted(part.keys() - PART_KEYS):
            if is_absent(part[key]):
                continue
            # A crop or a span of time that is ignored would show another picture than the data
            # mean.
            if key in PART_REFUSED and kind != "text":
                raise DataError(
                    f"sample {name}: a part is {brief(part)}; its '{key}' chooses a piece, and a "
                    "part is shown whole"
                )
            unused.add(f"a part's '{key}'")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        for key in present_keys(part, (*PICTURE_KEYS, *VIDEO_KEYS)):
            raise DataError(
                f"sample {name}: a text part has '{key}': {brief(part[key])}; give it a part of "
                "its own"
            )
        return {"type": "text", "text": part["text"]}
    if kind in ("thinking", "reasoning"):
        for key in (*THOUGHT_KEYS, "text"):
            if isinstance(part.get(key), str):
                return {"type": "thought", "thought": part[key]}
    if kind in ("video", "video_url"):
        for key in VIDEO_KEYS:
            value = part.get(key)
            if isinstance(value, list):
                raise DataError(
                    f"sample {name}: a video part is {brief(part)}, a list of frames; give each as "
                    "an image part"
                )
            if value is not None:
                return {"type": "video", "picture": picture_of(value, name, "video")}
        return with_index({"type": "video"}, part, name)
    if kind not in ("image", "image_url", "input_image"):
        raise DataError(
            f"sample {name}: a part is {brief(part)}, expected a text with its text, an image or "
            "a video"
        )
    if present_keys(part, ("text",)):
        raise DataError(f"sample {name}: a part is {brief(part)}; give the text a part of its own")
    # a table's picture has bytes and, beside them, a path that is their name
    keys = [key for key in PICTURE_KEYS if key != "path" or part.get("bytes") is None]
    single_value(part, tuple(keys), name, "a part")
    for key in keys:
        value = part.get(key)
        if value is not None:
            if key == "base64":
                # Without a media type: PIL looks at the bytes alone.
                value = f"data:;base64,{value}"
            return {"type": "image", "picture": picture_of(value, name)}
    if kind != "image":
        raise DataError(f"sample {name}: a part is {brief(part)}, expected an image_url")
    return with_index({"type": "image"}, part, name)


def with_index(visual: JsonObject, part: JsonObject, name: str) -> JsonObject:
    """Return a picture's or a video's part with the number that it has in the record's list, where
    the part gives one. Raises DataError for one that is no whole number."""
    index = part.get("index")
    if index is None:
        return visual
    if type(index) is not int:
        raise DataError(
            f"sample {name}: a part's 'index' is {brief(repr(index))}, expected a whole number"
        )
    return {**visual, "picture": index}


def files_of(record: JsonObject, keys: tuple[str, str], name: str) -> list[Media]:
    """Return the pictures or videos of a record or a turn, which are under one of the two `keys`
    (IMAGES or VIDEOS): one or a list of paths, data: URIs, bytes or `{"bytes", "path"}`.

    Raises:
        DataError: something else, or both fields.
    """
    present = present_keys(record, keys)
    if not present:
        return []
    if len(present) == 2:
        raise DataError(f"sample {name} has '{keys[0]}' and '{keys[1]}', expected one of them")
    value = record[present[0]]
    files = value if isinstance(value, list | tuple) else [value]
    return [picture_of(file, name, present[0]) for file in files]


def picture_of(value: Any, name: str, key: str = "image") -> Media:
    """Return a path as it is, a data: URI or bytes as bytes; of `{"bytes", "path"}` the first that
    is present.

    Raises:
        DataError: a URL, nothing, or something else.
    """
    kind = "video" if key.startswith("video") else "image"
    if isinstance(value, dict):
        for piece in present_keys(value, PART_REFUSED):
            raise DataError(
                f"sample {name}: '{key}' is {brief(value)}; its '{piece}' chooses a piece, and it "
                "is shown whole"
            )
        contents = (value.get("bytes"), value.get("url"), value.get("path"))
        value = next((content for content in contents if content is not None), value)
    if isinstance(value, bytes | bytearray | memoryview) and len(value):
        return bytes(value)
    if isinstance(value, str) and value[:5].lower() == "data:":
        return data_uri(value, name, kind)
    # Nothing is fetched in training: a host that is down, or changed, would change the data.
    if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise DataError(
            f"sample {name}: {kind} {value.split()[0][:80]} is a URL; fetch it, and name its path "
            "below the image root"
        )
    if isinstance(value, str) and value:
        return value
    shown = "empty" if isinstance(value, Media) else brief(value)
    raise DataError(
        f"sample {name}: '{key}' is {shown}, expected a path or a list of paths, a data: URI or "
        "bytes"
    )


def data_uri(uri: str, name: str, kind: str) -> bytes:
    """Return the bytes of `data:image/png;base64,...` (RFC 2397). Raises DataError."""
    header, comma, payload = uri.partition(",")
    try:
        content = unquote_to_bytes(payload)
        if header.lower().endswith(";base64"):
            content = base64.b64decode(re.sub(rb"\s", b"", content), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"sample {name}: the {kind}'s data: URI {uri[:40]}... is not base64: {error}"
        ) from error
    if not comma or not content:
        raise DataError(f"sample {name}: the {kind}'s data: URI {uri[:40]} holds no data")
    return content
