"""The LLaVA format: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}, ...]}`."""

from typing import Any

from owlfuse.data.formats.base import Source, field, without
from owlfuse.data.turns import chat, pictures_of
from owlfuse.types import Sample


class LLaVA(Source):
    """Chats about pictures, as LLaVA's instruction data come, JSON or JSONL. `image` (or `images`) is a path, a list of paths,
    or absent; other fields are kept as metadata."""

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        messages, images = chat(field(record, "conversations", list, name), pictures_of(record, name), name)
        return Sample(name, self.name, messages, images, without(record, "image", "images", "conversations"))
