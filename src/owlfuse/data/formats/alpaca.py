"""The Alpaca format: `{"instruction", "input", "output"}`, text only."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from owlfuse.data.formats.base import Source, field, without
from owlfuse.data.turn_keys import tools_of
from owlfuse.types import DataError, Sample


@dataclass(eq=False)
class Alpaca(Source):
    """Instructions and answers. A non-empty `input` follows the instruction on a line of its own; of a chat of one record,
    other fields are kept as metadata.

    Args:
        records_per_chat: how many records in a row make one chat, a turn each. Short instructions beside long chats about
            pictures are mostly padding otherwise.
    """

    records_per_chat: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.records_per_chat < 1:
            raise DataError(f"{self.file}: records_per_chat is {self.records_per_chat}, expected at least 1")

    def __len__(self) -> int:
        return -(-len(self.records) // self.records_per_chat)

    def __getitem__(self, index: int) -> Sample:
        """See `Source`."""
        first = index * self.records_per_chat
        samples = [self.read(i) for i in range(first, min(first + self.records_per_chat, len(self.records)))]
        if len(samples) == 1:
            return samples[0]
        messages = [message for sample in samples for message in sample.messages]
        return Sample(f"{samples[0].id}+{len(samples) - 1}", self.name, messages)

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """See `Source`."""
        for index in indices:
            first = index * self.records_per_chat
            for _, identity in super().ids(range(first, min(first + self.records_per_chat, len(self.records)))):
                yield index, identity

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        question = field(record, "instruction", str, name)
        if extra := record.get("input"):
            question = f"{question}\n{extra}"
        messages = [
            {"role": "user", "content": [{"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": field(record, "output", str, name)}]},
        ]
        return Sample(
            name,
            self.name,
            messages,
            [],
            without(record, "instruction", "input", "output", "tools"),
            tools=tools_of(record, name),
        )
