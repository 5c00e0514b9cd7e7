"""Plain exact match on a file of chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.base import Source
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.formats.marks import with_pictures
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.sharegpt import ShareGPT
from owlfuse.evaluation.benchmarks.base import QUESTION, Question, Task
from owlfuse.evaluation.matching import holds_answer
from owlfuse.evaluation.questions import normalize, question_samples

FORMATS: dict[str, type[Source]] = {
    "llava": LLaVA,
    "messages": Messages,
    "sharegpt": ShareGPT,
    "alpaca": Alpaca,
}


@dataclass(kw_only=True)
class ChatTask(Task):
    """A file of chats, as training takes them.

    Args:
        format: one of FORMATS.
    """

    ids_repeat: ClassVar[bool] = True

    format: Literal["llava", "messages", "sharegpt", "alpaca"] = "llava"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = FORMATS[self.format](self.file, self.image_root)

    def open(self) -> Sequence[Any]:
        """Returns of each record its number alone, since the source reads them."""
        return range(len(self.source))

    def record_name(self, number: int) -> str:
        """Returns what the source calls the record, without the file's name."""
        name = self.source.location(self.source.first_record(number))
        return name.removesuffix(f" of {self.file.name}")

    def sample(self, record: int, where: str) -> Sample:
        """Returns a chat.

        Raises DataError that names the record, as for a video, which is not asked about.
        """
        try:
            sample = self.source[record]
        except DataError as error:
            raise DataError(f"{self.file}: {error}") from error
        self.notes += [(self.file.name, sample.id, note, 1) for note in sample.notes]
        # a benchmark's pictures are opened by `open_image` alone
        if sample.videos:
            raise DataError(
                f"{where}: it has a video, and questions are asked about pictures alone"
            )
        return sample


@dataclass(kw_only=True)
class ExactMatch(ChatTask):
    """Each question of a file of chats by itself, its answer compared with the file's.

    Args:
        history: what was said before a question in its chat stands before it, as few-shot examples
            want it; else only the pictures that were shown do.
    """

    metric: ClassVar[str] = "exact_match"

    history: bool = False

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the chat's questions, the prompt's words around the last text of each turn."""
        for sample, answer, kind in question_samples(self.sample(record, where), self.history):
            # the question is the last turn, whatever stands before it
            *before, turn = sample.messages
            content = list(turn["content"])
            text_indices = [n for n, part in enumerate(content) if part["type"] == "text"]
            if text_indices:
                last = text_indices[-1]
                # the source has read the text's own marks, so those of the prompt alone are left
                prompt = "".join(part["text"] for part in with_pictures(self.prompt, 0))
                text = prompt.replace(QUESTION, content[last]["text"])
                content[last] = {"type": "text", "text": text}
            messages = [*before, {"role": "user", "content": content}]
            expected = sample.metadata.get("accepted", answer)
            yield Question(sample.id, messages, sample.images, expected, kind, tools=sample.tools)

    def questions(self) -> tuple[list[Question], list[tuple[str, str]]]:
        """Returns all questions (see `Task.questions`). As in the evaluation of a run, one metric
        has one rule: where some questions list their answers, the others' are lists of one."""
        questions, skipped = super().questions()
        if any(isinstance(question.expected, list) for question in questions):
            for question in questions:
                if not isinstance(question.expected, list):
                    question.expected = [question.expected]
        return questions, skipped

    def score(self, line: dict[str, Any]) -> float:
        """Returns 1 where the answer is the expected one, but for case and white space; where the
        data list the accepted ones, where it holds one of these."""
        expected = line["expected"]
        if isinstance(expected, list):
            return float(holds_answer(line["answer"], expected))
        return float(normalize(line["answer"]) == normalize(expected))
