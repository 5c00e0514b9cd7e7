"""How likely a model finds given answers: `loglikelihood`.

B rows, T text positions, V vocabulary, S tokens of the answers of all rows.
"""

from __future__ import annotations

from typing import Any

import torch

from owlfuse.core.errors import DataError
from owlfuse.core.types import Encoded, Sample
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.collate import Collator
from owlfuse.data.media.tiles import views_of
from owlfuse.data.words import hide_words
from owlfuse.evaluation.benchmarks.answering import Talker
from owlfuse.evaluation.benchmarks.perplexity import ready
from owlfuse.evaluation.lmms.prompts import Prompt, written
from owlfuse.model.loss import token_losses


class Likelihoods:
    """Log-likelihoods of answers after prompts.

    An answer stands where the chat template puts it, without white space around it, and its own
    tokens are measured: not the mark that ends a turn, so that an answer may go on.
    """

    def __init__(self, talker: Talker) -> None:
        self.talker = talker
        processor = talker.processor
        longest, image_token = talker.longest or 2**31, processor.image_token
        self.encoder = ChatEncoder(
            processor.tokenizer, processor.tokens_per_image, longest, image_token=image_token
        )
        self.size = (
            processor.image_processor.size["height"],
            processor.image_processor.size["width"],
        )
        self.collator = Collator(self.encoder.pad_id, (3, *self.size))

    def encode(self, prompt: Prompt, answer: str) -> Encoded:
        """Prompt and answer as ids, labels at the answer's.

        Raises DataError for an empty answer or too long a chat.
        """
        answer = hide_words(answer.strip(), self.encoder.image_token)
        if not answer:
            raise DataError(f"{prompt.name}: an answer whose likelihood is asked for is empty")
        asked = written(prompt, self.talker.processor)
        whole = written(prompt, self.talker.processor, answer)
        told = whole.removeprefix(asked) if whole.startswith(asked) else answer
        lead = len(told) - len(told.lstrip())
        text = asked + (told[: lead + len(answer)] if told[lead:].startswith(answer) else answer)
        ids, offsets = self.encoder.tokenize(text, [len(asked)], prompt.name)
        labels = [
            token if start >= len(asked) else -100
            for token, (start, _) in zip(ids, offsets, strict=True)
        ]
        tile = self.talker.processor.tile
        views = [views_of(picture, self.size) if tile else [picture] for picture in prompt.pictures]
        read: list[Any] = prompt.pictures
        sample = Sample(prompt.name, "lmms-eval", prompt.messages, read)
        encoded = self.encoder.expand(sample, ids, labels, [len(each) for each in views])
        if len(encoded.input_ids) > self.encoder.max_length:
            raise DataError(
                f"{prompt.name}: prompt and answer take {len(encoded.input_ids)} positions, and "
                "the model has "
                f"{self.encoder.max_length}"
            )
        if views:
            pictures = [view for each in views for view in each]
            encoded.pixel_values = list(
                self.talker.processor.image_processor(pictures)["pixel_values"]
            )
        return encoded

    @torch.inference_mode()
    def measure(self, items: list[Encoded]) -> list[tuple[float, bool]]:
        """(the answer's log-likelihood in nats, whether it is what greedy generation begins
        with) of each row."""
        batch = ready(self.talker, self.collator(items))
        places: Any = batch.supervised
        logits = self.talker.model.model(batch, logits_to_keep=places)
        wanted = batch.targets()[places]
        losses = token_losses(logits.double(), wanted)
        missed = (logits.argmax(-1) != wanted) & (wanted != -100)
        rows = places // batch.input_ids.shape[1]
        return [
            (-float(losses[rows == row].sum()), not bool(missed[rows == row].any()))
            for row in range(len(items))
        ]
