"""Turns as the formats write them -> messages of text and image parts, and the pictures that they show."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from owlfuse.data.formats.base import parts_of
from owlfuse.data.turn_keys import CALL_ROLES, ROLES, brief, extras_of, tool_calls_of
from owlfuse.types import DataError

PICTURE_KEYS = ("image_url", "image", "bytes", "path", "url", "base64")
"""Where an image part holds its picture; without one of them it shows the next of the sample's pictures."""


def chat(
    turns: Sequence[Any], pictures: list[str | bytes], name: str, videos: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[str | bytes], list[str]]:
    """Turns -> messages as `Sample` has them, the pictures in the order of their image parts, and the videos likewise.

    A turn has a role (`from` or `role`, see ROLES) and a content (`value` or `content`): a text with `<image>` placeholders,
    or a list of parts. Text parts are `{"type": "text", "text"}`; image parts are OpenAI's
    `{"type": "image_url", "image_url": {"url"}}` or Hugging Face's `{"type": "image", "image" | "path" | "url"}`. An image part
    or placeholder without a picture of its own shows the next of `pictures`, or the one of its `index`. Video parts are
    `{"type": "video", "video" | "path" | "url"}`, and with `videos` a text's `<video>` is a placeholder too.

    Raises:
        DataError: names the sample `name` and the turn that is wrong.
    """
    messages: list[dict[str, Any]] = []
    shown: dict[str, list[str | bytes | int | None]] = {"image": [], "video": []}
    for turn in turns:
        role, content, extras = read_turn(turn, name)
        parts = parts_of(content, bool(videos)) if isinstance(content, str) else [part_of(part, name) for part in content]
        for part in parts:
            if part["type"] in shown:
                shown[part["type"]].append(part.pop("picture", None))
        messages.append({"role": role, "content": parts, **extras})
    return messages, resolve(shown["image"], pictures, name, "image"), resolve(shown["video"], list(videos), name, "video")


def resolve(shown: list[Any], pictures: list[Any], name: str, kind: str) -> list[Any]:
    """Each image or video part's picture: its own, that of its index, or the next of the sample's. Where no part has its own,
    the sample's are taken as they are, and whoever encodes it counts them."""
    if all(picture is None for picture in shown):
        return pictures
    rest = iter(pictures)
    found: list[Any] = []
    for picture in shown:
        if isinstance(picture, int) and not 0 <= picture < len(pictures):
            raise DataError(f"sample {name}: an {kind} part has index {picture}, and there are {len(pictures)} {kind}s")
        taken = pictures[picture] if isinstance(picture, int) else next(rest, None) if picture is None else picture
        if taken is None:
            raise DataError(f"sample {name} has more {kind} parts without a file than its {len(pictures)} {kind}s")
        found.append(taken)
    left = len(list(rest))
    if left and not any(isinstance(picture, int) for picture in shown):
        raise DataError(f"sample {name} has {len(shown)} {kind} parts and {left} {kind}s that none of them shows")
    return found


def read_turn(turn: Any, name: str) -> tuple[str, str | list[Any], dict[str, Any]]:
    """Role, content and the other keys of one turn, in either spelling. Raises DataError."""
    expected = f"expected from or role ({', '.join(ROLES)}) and value or content"
    if not isinstance(turn, dict):
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {expected}")
    role = turn["from"] if turn.get("from") is not None else turn.get("role")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    role = role.lower().replace("-", "_") if isinstance(role, str) else role
    if role in CALL_ROLES and isinstance(content, str | list | dict):
        extras = extras_of(turn, "assistant", name)
        return "assistant", [], extras | {"tool_calls": tool_calls_of(content, name)}
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {expected}")
    extras = extras_of(turn, ROLES[role], name)
    if content is None and "tool_calls" in extras:
        content = []
    if not isinstance(content, str | list):
        raise DataError(f"sample {name}: a turn is {brief(turn)}, {expected}")
    return ROLES[role], content, extras


def part_of(part: Any, name: str) -> dict[str, Any]:
    """A part of a content -> `{"type": "text", "text"}`, or `{"type": "image"}` with its `picture` where it has one."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "video":
        return video_part(part, name)
    if kind not in ("image", "image_url", "input_image"):
        raise DataError(f"sample {name}: a part is {brief(part)}, expected a text with its text, an image or a video")
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
    """`{"type": "video"}`, with its path as `picture` where it has one. Raises DataError."""
    value = next((part[key] for key in ("video", "path", "url") if part.get(key) is not None), None)
    return {"type": "video"} if value is None else {"type": "video", "picture": video_path(value, name)}


def videos_of(record: dict[str, Any], name: str) -> list[str]:
    """The paths in a record's `video` or `videos`, one or a list. Raises DataError for something else, or both fields."""
    keys = [key for key in ("video", "videos") if record.get(key) is not None]
    if len(keys) == 2:
        raise DataError(f"sample {name} has 'video' and 'videos', expected one of them")
    value = record[keys[0]] if keys else []
    if isinstance(value, list) and not all(isinstance(one, str) for one in value):
        raise DataError(f"sample {name}: '{keys[0]}' is {brief(value)}, expected a path or a list of paths")
    return [video_path(one, name) for one in (value if isinstance(value, list) else [value])]


def video_path(value: Any, name: str) -> str:
    """A video's path below the image root. Raises DataError for anything else."""
    path = picture_of(value, name, "video") if isinstance(value, str) else value
    if not isinstance(path, str):
        raise DataError(f"sample {name}: 'video' is {brief(value)}, expected a path or a list of paths")
    return path


def pictures_of(record: dict[str, Any], name: str) -> list[str | bytes]:
    """The pictures in a record's `image` or `images`: one or a list of paths, data: URIs, bytes or `{"bytes", "path"}`.

    Raises:
        DataError: something else, or both fields.
    """
    keys = [key for key in ("image", "images") if record.get(key) is not None]
    if len(keys) == 2:
        raise DataError(f"sample {name} has 'image' and 'images', expected one of them")
    value = record[keys[0]] if keys else []
    return [picture_of(one, name, keys[0]) for one in (value if isinstance(value, list | tuple) else [value])]


def picture_of(value: Any, name: str, key: str = "image") -> str | bytes:
    """A path as it is, a data: URI or bytes as bytes; of `{"bytes", "path"}` the first that is there.

    Raises:
        DataError: a URL, nothing, or something else.
    """
    if isinstance(value, dict):
        value = next((value[k] for k in ("bytes", "url", "path") if value.get(k) is not None), value)
    if isinstance(value, bytes | bytearray | memoryview) and len(value):
        return bytes(value)
    if isinstance(value, str) and value[:5].lower() == "data:":
        return data_uri(value, name)
    if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise DataError(
            f"sample {name}: image {value.split()[0][:80]} is a URL; fetch it, and name its path below the image root"
        )
    if isinstance(value, str) and value:
        return value
    found = "empty" if isinstance(value, str | bytes) else brief(value)
    raise DataError(f"sample {name}: '{key}' is {found}, expected a path or a list of paths, a data: URI or bytes")


def data_uri(uri: str, name: str) -> bytes:
    """The bytes of `data:image/png;base64,...` (RFC 2397). Raises DataError."""
    header, comma, payload = uri.partition(",")
    try:
        encoded = unquote_to_bytes(payload)
        if header.lower().endswith(";base64"):
            encoded = base64.b64decode(re.sub(rb"\s", b"", encoded), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"sample {name}: an image's data: URI {uri[:40]}... is not base64: {error}") from error
    if not comma or not encoded:
        raise DataError(f"sample {name}: an image's data: URI {uri[:40]} holds no data")
    return encoded


def caption_messages(images: int, caption: Any, instructions: Sequence[str], identity: str, name: str) -> list[dict[str, Any]]:
    """A chat that asks for a caption: the images, one of the `instructions` (none: nothing more), and the caption. Which
    instruction is a hash of `identity`, so that it is the same in every run and whatever stands around the sample.

    Raises:
        DataError: a caption that is no text.
    """
    if not isinstance(caption, str):
        raise DataError(f"sample {name}: the caption is {brief(caption)}, expected a text")
    asked: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    if instructions:
        number = int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8], "little")
        asked.append({"type": "text", "text": f"\n{instructions[number % len(instructions)]}"})
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": caption}]}]
