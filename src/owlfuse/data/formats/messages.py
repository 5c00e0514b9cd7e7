"""The `messages` format of OpenAI and Hugging Face: `{"messages": [{"role", "content": text or parts}, ...], "images"}`."""

from typing import Any

from owlfuse.data.formats.base import VideoSource, field, without
from owlfuse.data.turn_keys import tools_of
from owlfuse.data.turns import chat, pictures_of, videos_of
from owlfuse.types import Sample


class Messages(VideoSource):
    """Chats whose turns hold a text or a list of parts, JSONL or JSON. An image part is OpenAI's
    `{"type": "image_url", "image_url": {"url"}}` or Hugging Face's `{"type": "image", "image" | "path" | "url"}`: a path below
    the image root or a data: URI; one without a picture shows the next of the record's `images`. A URL is an error: nothing
    is fetched. Other fields are kept as metadata."""

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        messages, images, videos = chat(
            field(record, "messages", list, name), pictures_of(record, name), name, videos_of(record, name)
        )
        metadata = without(record, "messages", "image", "images", "video", "videos", "tools", "functions")
        return Sample(name, self.name, messages, images, metadata, videos, tools_of(record, name))
