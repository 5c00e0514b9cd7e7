"""How likely a model finds given answers: `loglikelihood`.

B rows, T text positions, V vocabulary, S tokens of the answers of all rows.
"""

from __future__ import annotations

from typing import Any

import torch

from owlfuse.core.errors import DataError
from owlfuse.core.types import Encoded, Sample
from owlfuse.data.words import hide_words
from owlfuse.evaluation.benchmarks.answering import LoadedModel, chat_encoder
from owlfuse.evaluation.lmms.prompts import Prompt, render_prompt
from owlfuse.model.loss import token_losses


class Likelihoods:
    """Log-likelihoods of answers after prompts.

    An answer stands where the chat template puts it, without white space around it, and its own
    tokens are measured: not the mark that ends a turn, so that an answer may go on.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.processor = model.processor
        self.encoder, self.collator = chat_encoder(model.processor, model.max_positions)

    def encode(self, prompt: Prompt, answer: str) -> Encoded:
        """Prompt and answer as ids, labels at the answer's.

        Raises DataError for an empty answer or too long a chat.
        """
        # an <image> of the answer is a word, not a picture
        answer = hide_words(answer.strip(), self.encoder.image_token)
        if not answer:
            raise DataError(f"{prompt.name}: an answer whose likelihood is asked for is empty")
        question = render_prompt(prompt, self.processor)
        text = question + self.templated_answer(prompt, question, answer)
        # split at the answer: a token over the border would belong to both
        ids, offsets = self.encoder.tokenize(text, [len(question)], prompt.name)
        labels = []
        for token, (start, _) in zip(ids, offsets, strict=True):
            labels.append(token if start >= len(question) else -100)
        views = [self.processor.views(picture) for picture in prompt.pictures]
        pictures: list[Any] = prompt.pictures  # opened already, where `Sample` names files
        sample = Sample(prompt.name, "lmms-eval", prompt.messages, pictures)
        view_counts = [len(picture_views) for picture_views in views]
        encoded = self.encoder.expand(sample, ids, labels, view_counts)
        if len(encoded.input_ids) > self.encoder.max_length:
            raise DataError(
                f"{prompt.name}: prompt and answer take {len(encoded.input_ids)} positions, and "
                f"the model has {self.encoder.max_length}"
            )
        if views:
            encoded.pixel_values = list(self.processor.image_processor(views)["pixel_values"])
        return encoded

    def templated_answer(self, prompt: Prompt, question: str, answer: str) -> str:
        """Returns the answer with the white space that the chat template puts before it; without
        where the template does not write it behind the question as it is."""
        chat = render_prompt(prompt, self.processor, answer)
        if not chat.startswith(question):
            return answer
        behind = chat.removeprefix(question)
        space = len(behind) - len(behind.lstrip())
        if not behind[space:].startswith(answer):
            return answer
        return behind[: space + len(answer)]

    @torch.inference_mode()
    def measure(self, items: list[Encoded]) -> list[tuple[float, bool]]:
        """(the answer's log-likelihood in nats, whether it is what greedy generation begins
        with) of each row."""
        batch = self.model.to_device(self.collator(items))
        # logits of the answers alone: all of a batch would take much memory
        positions: Any = batch.supervised
        logits = self.model.model.model(batch, logits_to_keep=positions)
        targets = batch.targets()[positions]
        # float64: differences between choices may be small
        losses = token_losses(logits.double(), targets)
        differs = (logits.argmax(-1) != targets) & (targets != -100)
        rows = positions // batch.input_ids.shape[1]
        results = []
        for row in range(len(items)):
            in_row = rows == row
            results.append((-float(losses[in_row].sum()), not bool(differs[in_row].any())))
        return results
