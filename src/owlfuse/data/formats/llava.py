"""The LLaVA format: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}, ...]}`."""

from typing import Any

from owlfuse.data.formats.base import Source, field, parts_of
from owlfuse.types import DataError, Sample

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LLaVA(Source):
    """Chats about pictures, as LLaVA's instruction data come. `image` is a path, a list of paths, or absent; other fields
    are kept as metadata."""

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        messages = []
        for turn in field(record, "conversations", list, name):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
                raise DataError(f"sample {name}: a turn is {str(turn)[:80]}, expected from ({', '.join(ROLES)}) and value")
            messages.append({"role": ROLES[turn["from"]], "content": parts_of(turn["value"])})
        image = record.get("image", [])
        images = [image] if isinstance(image, str) else image
        if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
            raise DataError(f"sample {name}: 'image' is {str(image)[:80]}, expected a path or a list of paths")
        metadata = {key: value for key, value in record.items() if key not in ("id", "image", "conversations")}
        return Sample(name, self.name, messages, images, metadata)
