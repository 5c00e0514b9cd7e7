"""The LLaVA format: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}, ...]}`, and
`video` with `<video>` likewise."""

from typing import Any

from owlfuse.data.formats.base import VideoSource, field, without
from owlfuse.data.turn_keys import tools_of
from owlfuse.data.turns import chat, pictures_of, videos_of
from owlfuse.types import Sample


class LLaVA(VideoSource):
    """Chats about pictures and videos, as LLaVA's instruction data come, JSON or JSONL. `image` (or `images`) and `video` (or
    `videos`) are a path, a list of paths, or absent; other fields are kept as metadata. Without `video`, a `<video>` is text
    like any other."""

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        messages, images, videos = chat(
            field(record, "conversations", list, name), pictures_of(record, name), name, videos_of(record, name)
        )
        metadata = without(record, "image", "images", "conversations", "video", "videos", "tools", "functions")
        return Sample(name, self.name, messages, images, metadata, videos, tools_of(record, name))
