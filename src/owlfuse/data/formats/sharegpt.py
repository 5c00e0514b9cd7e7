"""The ShareGPT format:

`{"id", "system", "conversations": [{"from", "value"} or {"role", "content"}, ...], "images"}`.
"""

from owlfuse.data.formats.base import ChatSource


class ShareGPT(ChatSource):
    """Chats as ShareGPT's many heirs write them, JSON or JSONL: turns under `conversations` or
    `conversation`, any of the role names in `turn_keys.ROLES`, tool calls as turns of
    `function_call` and `observation`, a `system` text beside them or as a turn, pictures in `image`
    or `images`, shown by `<image>` marks. What else a record may hold, and what is refused, is told
    in `records`; other fields are kept as metadata and listed in the log."""
