"""The ShareGPT format: `{"id", "system", "conversations": [{"from", "value"} or {"role", "content"}, ...], "images"}`."""

from typing import Any

from owlfuse.data.formats.base import VideoSource, field, without
from owlfuse.data.turn_keys import tools_of
from owlfuse.data.turns import chat, pictures_of, videos_of
from owlfuse.types import DataError, Sample


class ShareGPT(VideoSource):
    """Chats as ShareGPT's many heirs write them, JSON or JSONL: turns under `conversations` or `conversation`, any of the role
    names in `turn_keys.ROLES`, a `system` text beside them or as a turn, pictures in `image` or `images`, shown by `<image>`
    placeholders. Other fields are kept as metadata."""

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        key = "conversation" if "conversation" in record and "conversations" not in record else "conversations"
        messages, images, videos = chat(
            field(record, key, list, name), pictures_of(record, name), name, videos_of(record, name)
        )
        if record.get("system"):
            if any(message["role"] == "system" for message in messages):
                raise DataError(f"sample {name} has a 'system' and a system turn, expected one of them")
            system = field(record, "system", str, name)
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        metadata = without(record, "system", "image", "images", key, "video", "videos", "tools", "functions")
        return Sample(name, self.name, messages, images, metadata, videos, tools_of(record, name))
