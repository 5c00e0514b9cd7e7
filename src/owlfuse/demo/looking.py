"""Where an answer looked, as pictures for the page."""

from __future__ import annotations

from dataclasses import dataclass

from owlfuse.chat import Conversation
from owlfuse.demo.pictures import data_uri, fitted
from owlfuse.evaluation.explain import attention_to_pictures, whole_maps
from owlfuse.evaluation.overlays import density, overlay


@dataclass
class Look:
    """A picture with where the answer looked."""

    uri: str
    """Of the overlay."""
    share: float
    """Of all that the answer looked at, over the conversation's pictures."""


def looked_at(conversation: Conversation) -> list[Look]:
    """One for each picture of the conversation, the same color for the same weight in all. No other thread may use the model
    meanwhile. Raises as `attention_to_pictures`."""
    if conversation.last is None or not conversation.pictures:
        return []
    _, inputs, answer_ids = conversation.last
    pictures, processor = conversation.pictures, conversation.processor
    maps = whole_maps(processor, pictures, attention_to_pictures(conversation.model, inputs, answer_ids))
    peak = max(float(density(one).max()) for one in maps)
    return [
        Look(data_uri(overlay(fitted(picture), one, peak)), float(one.sum()))
        for picture, one in zip(pictures, maps, strict=True)
    ]
