"""The LLaVA format: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}, ...]}`, and
`video` with `<video>` likewise."""

from typing import Any

from owlfuse.data.formats.base import Source, field, parts_of
from owlfuse.types import DataError, Sample

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LLaVA(Source):
    """Chats about pictures and videos, as LLaVA's instruction data come. `image` and `video` are a path, a list of paths, or
    absent; other fields are kept as metadata. Without `video`, a `<video>` is text like any other."""

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        images, videos = paths_of(record, "image", name), paths_of(record, "video", name)
        messages = []
        for turn in field(record, "conversations", list, name):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
                raise DataError(f"sample {name}: a turn is {str(turn)[:80]}, expected from ({', '.join(ROLES)}) and value")
            messages.append({"role": ROLES[turn["from"]], "content": parts_of(turn["value"], videos=bool(videos))})
        metadata = {key: value for key, value in record.items() if key not in ("id", "image", "video", "conversations")}
        return Sample(name, self.name, messages, images, metadata, videos)


def paths_of(record: dict[str, Any], key: str, name: str) -> list[str]:
    """A field that is a path, a list of paths, or absent."""
    value = record.get(key, [])
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"sample {name}: '{key}' is {str(value)[:80]}, expected a path or a list of paths")
    return paths
