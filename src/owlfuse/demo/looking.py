"""Where an answer looked, as pictures for the page."""

from __future__ import annotations

from owlfuse.chat import Conversation
from owlfuse.demo.talkers import Talker


def looked_at(talker: Talker, conversation: Conversation) -> list[str]:
    """A data URI for each picture of the conversation."""
    return []
