"""A model answers the questions of a benchmark, batch by batch.

B rows, T text positions, N images, H and W their size in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from owlfuse.artifacts.load import load_talker
from owlfuse.core.errors import DataError, one_line
from owlfuse.core.types import Sample
from owlfuse.data.chat.checks import control_tokens, flatten
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.media.images import open_image
from owlfuse.data.words import show_words
from owlfuse.evaluation.benchmarks.base import Question, Task


class Talker:
    """A run's, an exported or an imported model, on a device, with its processor.

    Args:
        which: of a run's checkpoints.
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
        which: str = "last",
    ) -> None:
        self.model, self.processor = load_talker(folder, which)
        if dtype != "saved":
            cast(self.model, getattr(torch, dtype))
        self.model.to(device).eval()  # type: ignore[arg-type]  # lost in transformers' wrapper
        self.device = device
        self.thinking = thinking
        text = self.model.model.llm.config.get_text_config()
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        """The most positions that the LLM has, None where its configuration does not say."""

    def answers(self, rows: Any) -> list[str]:
        """The answers in rows of generated ids."""
        return self.processor.answer_format.answers(self.processor.tokenizer, rows, self.thinking)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights and buffers in a dtype, rotary frequencies as they are (see
    `MultimodalLM._apply`)."""
    model.to(dtype)


@dataclass
class Wrong:
    """A question that is left out."""

    question: Question
    reason: str


@dataclass
class Work:
    """A batch: the questions that can be answered, what the model takes of them, and those that
    are left out."""

    questions: list[Question]
    prompts: list[str]
    inputs: Any
    wrong: list[Wrong]


class Prompts(Dataset):
    """Questions as the model's text, their pictures opened, under the benchmark's policy for wrong
    ones.

    Args:
        longest: the most positions that prompt and answer may take.
    """

    def __init__(
        self,
        task: Task,
        questions: list[Question],
        processor: Any,
        longest: int | None,
        thinking: bool = False,
    ) -> None:
        self.task = task
        self.questions = questions
        self.processor = processor
        self.longest = longest
        self.thinking = thinking
        self.control = control_tokens(processor.tokenizer, processor.image_token)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Question, str, Any] | Wrong:
        question = self.questions[index]
        try:
            return question, *self.prepare(question)
        except DataError as error:
            reason = one_line(str(error))
            if self.task.on_error == "error":
                raise DataError(f"{self.task.file}: {question.place}: {reason}") from error
            return Wrong(question, reason)

    def prepare(self, question: Question) -> tuple[str, list[Image.Image]]:
        """The prompt as the chat template writes it, and the pictures.

        Raises:
            DataError: a control token in the question, a picture that cannot be read, a prompt that
                is too long.
        """
        sample = Sample(question.id, self.task.file.stem, question.messages, question.images)
        messages = flatten(sample, self.control, self.processor.image_token)
        text = render(self.processor.tokenizer, messages, True, self.thinking)
        self.check_length(question, text)
        return text, self.opened(question)

    def opened(self, question: Question) -> list[Image.Image]:
        """The pictures of a question, RGB. Raises DataError."""
        root, limit = self.task.root, self.task.max_pixels
        return [
            open_image(root, picture, question.id, limit)
            for picture in self.task.pictures(question)
        ]

    def check_length(self, question: Question, text: str) -> None:
        """Raises DataError where the model has no positions for the prompt and an answer."""
        if self.longest is None:
            return
        ids = self.processor.encode_texts([text], None, add_special_tokens=False)["input_ids"][0]
        tokens = len(ids) + len(question.images) * (self.processor.tokens_per_image - 1)
        if tokens + self.task.max_new_tokens > self.longest:
            raise DataError(
                f"sample {question.id}: its prompt takes {tokens} positions and the answer "
                f"{self.task.max_new_tokens}, and the "
                f"model has {self.longest}"
            )

    def collate(self, items: list[Any]) -> Work:
        """A batch of what `__getitem__` gives, padded on the left."""
        wrong = [item for item in items if isinstance(item, Wrong)]
        right = [item for item in items if not isinstance(item, Wrong)]
        inputs: Any = None
        if right:
            pictures = [picture for _, _, mine in right for picture in mine]
            inputs = self.processor(images=pictures, text=[text for _, text, _ in right])
        prompts = [show_words(text, self.processor.image_token) for _, text, _ in right]
        return Work([question for question, _, _ in right], prompts, inputs, wrong)


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")  # see evaluation.generation
def generated(talker: Talker, inputs: Any, **options: Any) -> Tensor:
    """What `generate` writes after the rows (B, T) of `inputs`: (B, at most max_new_tokens) ids."""
    tokenizer = talker.processor.tokenizer  # for an end mark of several tokens
    rows = talker.model.generate(**inputs.to(talker.device), tokenizer=tokenizer, **options)
    return rows[:, inputs["input_ids"].shape[1] :]


def answer(talker: Talker, task: Task, work: Work) -> list[dict[str, Any]]:
    """The likeliest answer to each question, greedily: what predictions.jsonl holds of it."""
    new = generated(
        talker, work.inputs, max_new_tokens=task.max_new_tokens, do_sample=False, num_beams=1
    )
    texts = talker.answers(new)
    lines = []
    for question, prompt, text in zip(work.questions, work.prompts, texts, strict=True):
        line = {"id": question.id, "prompt": prompt, "answer": text}
        line |= {"expected": question.expected, "group": question.group}
        lines.append(line | {"score": task.score(line)})
    return lines
