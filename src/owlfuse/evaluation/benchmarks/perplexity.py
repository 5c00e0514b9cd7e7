"""Perplexity of the answers that a file of chats has.

B rows, T text positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from owlfuse.core.types import Batch, Encoded, Sample
from owlfuse.data.chat.checks import flatten
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.collate import Collator
from owlfuse.data.words import show_words
from owlfuse.evaluation.benchmarks.answering import Prompts, Talker, Work, Wrong
from owlfuse.evaluation.benchmarks.base import Question, Task
from owlfuse.evaluation.benchmarks.exact import ChatTask
from owlfuse.model.loss import summed_loss


@dataclass(kw_only=True)
class Perplexity(ChatTask):
    """exp of the mean cross-entropy over all supervised tokens of the file: what the assistant
    says, and its ends of turn."""

    generates: ClassVar[bool] = False

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`: a whole chat, as it is."""
        sample = self.sample(record, where)
        yield Question(sample.id, sample.messages, sample.images, None)

    def score(self, line: dict[str, Any]) -> float:
        """The chat's own perplexity."""
        return math.exp(min(line["loss"] / line["tokens"], 700.0))

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`perplexity`, `loss` (nats a token) and how many `tokens`."""
        tokens = sum(line["tokens"] for line in lines)
        loss = math.fsum(line["loss"] for line in lines) / tokens
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss, "tokens": tokens}


class Chats(Prompts):
    """Chats as token ids and labels, as training has them."""

    def __init__(
        self,
        task: Task,
        questions: list[Question],
        processor: Any,
        longest: int | None,
        thinking: bool = False,
    ) -> None:
        super().__init__(task, questions, processor, longest, thinking)
        tokenizer, image_token = processor.tokenizer, processor.image_token
        self.encoder = ChatEncoder(
            tokenizer, processor.tokens_per_image, longest or 2**31, image_token=image_token
        )
        size = processor.image_processor.size
        self.collator = Collator(self.encoder.pad_id, (3, size["height"], size["width"]))

    # tokens in place of pictures
    def prepare(self, question: Question) -> tuple[str, Encoded]:  # type: ignore[override]
        """The chat as the template writes it, and encoded. Raises DataError."""
        sample = Sample(question.id, self.task.file.stem, question.messages, question.images)
        encoded = self.encoder.encode(sample)
        text = self.encoder.render(
            sample, flatten(sample, self.control, self.processor.image_token)
        )
        text = show_words(text, self.processor.image_token)
        if question.images:
            encoded.pixel_values = list(
                self.processor.image_processor(self.opened(question))["pixel_values"]
            )
        return text, encoded

    def collate(self, items: list[Any]) -> Work:
        """A batch of what `__getitem__` gives, padded on the right."""
        wrong = [item for item in items if isinstance(item, Wrong)]
        right = [item for item in items if not isinstance(item, Wrong)]
        batch = self.collator([encoded for _, _, encoded in right]) if right else None
        return Work(
            [question for question, _, _ in right], [text for _, text, _ in right], batch, wrong
        )


def ready(talker: Talker, batch: Batch) -> Batch:
    """The batch on the model's device and in its dtype, every id one that it has an embedding
    of."""
    batch = batch.to(talker.device)
    embeddings: Any = talker.model.get_input_embeddings()
    unknown = batch.placeholder & (batch.input_ids >= embeddings.num_embeddings)
    # an image's tokens stand there, the id does not matter
    batch.input_ids = batch.input_ids.masked_fill(unknown, 0)
    batch.pixel_values = batch.pixel_values.to(next(talker.model.model.vision.parameters()).dtype)
    return batch


@torch.inference_mode()
def measure(talker: Talker, task: Task, work: Work) -> list[dict[str, Any]]:
    """The cross-entropy of each chat, summed over its supervised tokens, in nats: what
    predictions.jsonl holds of it."""
    batch = ready(talker, work.inputs)
    logits, labels = talker.model.model(batch)[:, :-1], batch.labels[:, 1:]
    lines = []
    for question, prompt, row, wanted in zip(
        work.questions, work.prompts, logits, labels, strict=True
    ):
        kept = wanted != -100
        loss, count = summed_loss(row[kept].double(), wanted[kept])
        line = {
            "id": question.id,
            "prompt": prompt,
            "loss": float(loss),
            "tokens": int(count),
            "group": question.group,
        }
        lines.append(line | {"score": task.score(line)})
    return lines
