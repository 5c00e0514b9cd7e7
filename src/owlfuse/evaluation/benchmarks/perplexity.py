"""Perplexity of the answers that a file of chats has.

B rows, T text positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from owlfuse.core.types import Batch, Encoded
from owlfuse.data.chat.checks import flatten
from owlfuse.evaluation.benchmarks.answering import (
    LoadedModel,
    QuestionBatch,
    QuestionDataset,
    chat_encoder,
)
from owlfuse.evaluation.benchmarks.base import Question
from owlfuse.evaluation.benchmarks.exact import ChatTask
from owlfuse.model.loss import summed_loss


@dataclass(kw_only=True)
class Perplexity(ChatTask):
    """exp of the mean cross-entropy over all supervised tokens of the file: what the assistant
    says, and its ends of turn."""

    generates: ClassVar[bool] = False

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the whole chat, as it is."""
        sample = self.sample(record, where)
        yield Question(sample.id, sample.messages, sample.images, None, tools=sample.tools)

    def score(self, line: dict[str, Any]) -> float:
        """Returns the chat's own perplexity."""
        # exp of more than 709 is no float
        return math.exp(min(line["loss"] / line["tokens"], 700.0))

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """Returns `perplexity`, `loss` (nats a token) and how many `tokens`."""
        tokens = sum(line["tokens"] for line in lines)
        # fsum rounds once, however many chats there are
        loss = math.fsum(line["loss"] for line in lines) / tokens
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss, "tokens": tokens}


class ChatDataset(QuestionDataset):
    """Chats as token ids and labels, as training has them; arguments are `QuestionDataset`'s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder, self.collator = chat_encoder(self.processor, self.max_positions)

    def prepare(self, question: Question) -> tuple[str, Encoded]:
        """Returns the chat as the template writes it, and encoded. Raises DataError."""
        sample = self.sample(question)
        # only the pictures say how many views each has
        views = [self.processor.views(picture) for picture in self.open_pictures(question)]
        encoded = self.encoder.encode(sample, [len(picture_views) for picture_views in views])
        messages = flatten(sample, self.control, self.processor.image_token)
        text = self.encoder.render(sample, messages)
        if views:
            encoded.pixel_values = list(self.processor.image_processor(views)["pixel_values"])
        return text, encoded

    def model_inputs(self, texts: list[str], contents: list[Any]) -> Batch:
        """Returns a batch of encoded chats, padded on the right."""
        return self.collator(contents)


@torch.inference_mode()
def measure(model: LoadedModel, batch: QuestionBatch) -> list[dict[str, Any]]:
    """Returns the cross-entropy of each chat, summed over its supervised tokens, in nats: what
    predictions.jsonl holds."""
    chats = model.to_device(batch.inputs)
    logits, labels = model.model.model(chats)[:, :-1], chats.labels[:, 1:]
    outputs = []
    for row, targets in zip(logits, labels, strict=True):
        supervised = targets != -100
        # float64 of the supervised positions alone, a row at a time: all would take much memory
        loss, count = summed_loss(row[supervised].double(), targets[supervised])
        outputs.append({"loss": float(loss), "tokens": int(count)})
    return batch.predictions(outputs)
