"""The LLaVA format: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value":
"<image>\n..."}, ...]}`, and `video` with `<video>` likewise."""

from owlfuse.core.types import JsonObject, Sample
from owlfuse.data.formats.base import VideoSource
from owlfuse.data.formats.records import read_chat


class LLaVA(VideoSource):
    """Chats about pictures and videos, as LLaVA's instruction data come, JSON or JSONL. `image` (or
    `images`) and `video` (or `videos`) are a path, a list of paths, or absent. What else a record
    may hold, and what is refused, is told in `records`; other fields are kept as metadata and
    listed in the log."""

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        return read_chat(record, name, self.name, "conversations")
