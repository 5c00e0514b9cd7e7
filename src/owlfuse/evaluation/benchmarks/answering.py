"""A model answers the questions of a benchmark, batch by batch.

B rows, T text positions, N images, H and W their size in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from owlfuse.artifacts.load import load_with_processor
from owlfuse.core.errors import DataError, one_line
from owlfuse.core.types import Batch, Message, Sample
from owlfuse.data.chat.checks import control_tokens, flatten, unwritten_roles
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.collate import Collator
from owlfuse.data.media.images import open_image
from owlfuse.data.words import show_words
from owlfuse.evaluation.benchmarks.base import Question, Task
from owlfuse.evaluation.generation import generate
from owlfuse.model.llm import position_limit

UNLIMITED = 2**31
"""Positions of an LLM whose configuration names no limit."""


class LoadedModel:
    """A run's, an exported or an imported model on a device, with its processor.

    Args:
        checkpoint: of a run; by default its last.
        dtype: `saved`: as the folder has its weights; or torch's name of another, as `float32`.
        thinking: prompts ask for a thought before the answer, where the chat template knows of
            thoughts.

    Raises:
        DataError: a folder without a tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: torch.device,
        thinking: bool = False,
        checkpoint: Path | None = None,
    ) -> None:
        self.model, self.processor = load_with_processor(folder, checkpoint=checkpoint)
        module: Any = self.model  # transformers' wrapper of `to` hides the types of torch's
        # rotary frequencies keep float32 (see `MultimodalLM._apply`)
        if dtype != "saved":
            module.to(getattr(torch, dtype))
        module.to(device).eval()
        self.device = device
        self.thinking = thinking
        self.max_positions = position_limit(self.model.model.llm)

    def generate(self, inputs: Any, **options: Any) -> Tensor:
        """Returns the ids that follow the processor's `inputs` (see `evaluation.generation`)."""
        return generate(self.model, inputs.to(self.device), self.processor.tokenizer, **options)

    def decode(self, rows: Any) -> list[str]:
        """Returns the answers in rows of generated ids: see `AnswerFormat.answer`."""
        tokenizer, answer_format = self.processor.tokenizer, self.processor.answer_format
        return [answer_format.answer(tokenizer, row, self.thinking) for row in rows]

    def is_unfinished_thought(self, row: Any) -> bool:
        """Returns whether a row of generated ids is a thought that did not end."""
        tokenizer, answer_format = self.processor.tokenizer, self.processor.answer_format
        return answer_format.is_unfinished_thought(tokenizer, row, self.thinking)

    def is_cut(self, row: Any) -> bool:
        """Returns whether a row of generated ids did not end."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return self.processor.answer_format.is_cut(self.processor.tokenizer, row, ends)

    def to_device(self, batch: Batch) -> Batch:
        """Returns the batch on the model's device and in its dtype, every id one that it has an
        embedding of."""
        batch = batch.to(self.device)
        batch.input_ids = self.model.embeddable_ids(batch.input_ids, batch.placeholder)
        dtype = next(self.model.model.vision.parameters()).dtype
        batch.pixel_values = batch.pixel_values.to(dtype)
        return batch


def chat_encoder(processor: Any, max_positions: int | None) -> tuple[ChatEncoder, Collator]:
    """Returns what makes batches of whole chats for a processor's model, as in training."""
    encoder = ChatEncoder(
        processor.tokenizer,
        processor.tokens_per_image,
        max_positions or UNLIMITED,
        image_token=processor.image_token,
    )
    size = processor.image_processor.size
    return encoder, Collator(encoder.pad_id, (3, size["height"], size["width"]))


@dataclass
class SkippedQuestion:
    """A question that is left out."""

    question: Question
    reason: str


@dataclass
class QuestionBatch:
    """The questions of a batch that can be answered, what the model takes of them, and those that
    are left out."""

    questions: list[Question]
    prompts: list[str]
    inputs: Any
    skipped: list[SkippedQuestion]

    def predictions(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the lines of predictions.jsonl: the model's output for each question."""
        lines = []
        for question, prompt, output in zip(self.questions, self.prompts, outputs, strict=True):
            line = {"id": question.id, "prompt": prompt, **output, "group": question.group}
            if question.has_pages:
                line["several_pages"] = True
            lines.append(line)
        return lines


# eq=False: a dataset compares and hashes by identity
@dataclass(eq=False)
class QuestionDataset(Dataset):
    """Questions as the model's text, their pictures opened, under the benchmark's policy for wrong
    ones.

    Args:
        max_positions: the most positions that prompt and answer may take.
    """

    task: Task
    questions: list[Question]
    processor: Any
    max_positions: int | None
    thinking: bool = False

    def __post_init__(self) -> None:
        # once: the same for every question
        self.control = control_tokens(self.processor.tokenizer, self.processor.image_token)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Question, str, Any] | SkippedQuestion:
        question = self.questions[index]
        try:
            return question, *self.prepare(question)
        except DataError as error:
            reason = one_line(str(error))
            if self.task.on_error == "error":
                raise DataError(f"{self.task.file}: {question.record_name}: {reason}") from error
            return SkippedQuestion(question, reason)

    def prepare(self, question: Question) -> tuple[str, Any]:
        """Returns the prompt as the chat template writes it, and the pictures.

        Raises:
            DataError: a control token in the question, a picture that cannot be read, a prompt that
                is too long.
        """
        # as training renders chats, so that a prompt has the tokens that were learned
        messages = flatten(self.sample(question), self.control, self.processor.image_token)
        options = {"tools": question.tools} if question.tools else {}

        def asked(messages: list[Message]) -> str:
            return render(self.processor.tokenizer, messages, True, self.thinking, **options)

        text = asked(messages)
        if missing := unwritten_roles(messages, text, asked):
            raise DataError(f"it has {missing[0]}, which the chat template does not write")
        if not self.processor.tile:
            # first, without pictures, which may be large
            self.check_length(question, text, len(question.images))
            return text, self.open_pictures(question)
        pictures = self.open_pictures(question)
        views = sum(len(self.processor.views(picture)) for picture in pictures)
        self.check_length(question, text, views)
        return text, pictures

    def sample(self, question: Question) -> Sample:
        """Returns the question as a chat."""
        return Sample(
            question.id,
            self.task.file.stem,
            question.messages,
            question.images,
            tools=question.tools,
        )

    def open_pictures(self, question: Question) -> list[Image.Image]:
        """Returns the pictures of a question, RGB, and notes whether one has several pages. Raises
        DataError."""
        root, limit = self.task.root, self.task.max_pixels
        pictures = []
        for picture in self.task.pictures(question):
            pictures.append(open_image(root, picture, question.id, limit))
        question.has_pages = any(picture.info["pages"] > 1 for picture in pictures)
        return pictures

    def check_length(self, question: Question, text: str, views: int) -> None:
        """Raises DataError where the model has no positions for the prompt, its pictures as so many
        views, and an answer."""
        if self.max_positions is None:
            return
        ids = self.processor.encode_texts([text], None, add_special_tokens=False)["input_ids"][0]
        # a placeholder for each picture is among the ids already
        tokens = len(ids) - len(question.images) + views * self.processor.tokens_per_image
        if tokens + self.task.max_new_tokens > self.max_positions:
            raise DataError(
                f"sample {question.id}: its prompt takes {tokens} positions and the answer "
                f"{self.task.max_new_tokens}, and the model has {self.max_positions}"
            )

    def collate(self, items: list[Any]) -> QuestionBatch:
        """Returns a batch of what `__getitem__` gives."""
        batch = QuestionBatch([], [], None, [])
        texts, contents = [], []
        for item in items:
            if isinstance(item, SkippedQuestion):
                batch.skipped.append(item)
                continue
            question, text, content = item
            batch.questions.append(question)
            batch.prompts.append(show_words(text, self.processor.image_token))
            texts.append(text)
            contents.append(content)
        if texts:
            batch.inputs = self.model_inputs(texts, contents)
        return batch

    def model_inputs(self, texts: list[str], contents: list[Any]) -> Any:
        """Returns what the model takes of prompts and their pictures, padded on the left."""
        return self.processor(images=contents, text=texts)


def answer(model: LoadedModel, task: Task, batch: QuestionBatch) -> list[dict[str, Any]]:
    """Returns the likeliest answer to each question, greedily: what predictions.jsonl holds."""
    ids = model.generate(
        batch.inputs,
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    outputs = []
    for question, row, text in zip(batch.questions, ids, model.decode(ids), strict=True):
        output = {"answer": text, "expected": question.expected}
        if model.is_unfinished_thought(row):
            output["thought_unfinished"] = True
        elif model.is_cut(row):
            output["cut"] = True
        outputs.append(output)
    return batch.predictions(outputs)
