"""`{"pictures": "folder", "questions": [{"picture", "question", "answer"}, ...]}`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample, without_keys
from owlfuse.data.formats.base import PictureSource, field


@dataclass(eq=False)
class QuestionList(PictureSource):
    """A list of questions, a chat each. Its fields are keys of the yaml, behind those of every
    source.

    Args:
        system: a text for the system turn; by default there is none.
    """

    system: str | None = None

    def open(self) -> Sequence[Any]:
        """See `Source`: the records by number."""
        content = json.loads(self.file.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise DataError(f"{self.file}: expected an object with a list 'questions'")
        return content["questions"]

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        question, answer = field(record, "question", str, name), field(record, "answer", str, name)
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        if self.system:
            messages.insert(
                0, {"role": "system", "content": [{"type": "text", "text": self.system}]}
            )
        metadata = without_keys(record, ["id", "picture", "question", "answer"])
        return Sample(name, self.name, messages, [field(record, "picture", str, name)], metadata)
