"""The LLaVA format: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value":
"<image>\n..."}, ...]}`, and `video` with `<video>` likewise."""

from owlfuse.data.formats.base import ChatSource


class LLaVA(ChatSource):
    """Chats about pictures and videos, as LLaVA's instruction data come, JSON or JSONL. `image` (or
    `images`) and `video` (or `videos`) are a path, a list of paths, or absent. What else a record
    may hold, and what is refused, is told in `records`; other fields are kept as metadata and
    listed in the log."""
