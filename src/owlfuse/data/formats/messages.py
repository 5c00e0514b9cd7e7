"""The `messages` format of OpenAI and Hugging Face:

`{"messages": [{"role", "content": text or parts}, ...], "images"}`.
"""

from owlfuse.data.formats.base import ChatSource


class Messages(ChatSource):
    """Chats whose turns hold a text or a list of parts, JSONL or JSON. An image part is OpenAI's
    `{"type": "image_url", "image_url": {"url"}}` or Hugging Face's `{"type": "image", "image" |
    "path" | "url"}`: a path below the image root or a data: URI; one without a picture shows the
    next of the record's `images`. A URL is an error: nothing is fetched. What else a record may
    hold, and what is refused, is told in `records`; other fields are kept as metadata and listed in
    the log."""

    chat_key = "messages"
