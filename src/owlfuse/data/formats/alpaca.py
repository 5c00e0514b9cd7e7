"""The Alpaca format: `{"instruction", "input", "output"}`, text only."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from owlfuse.core.errors import DataError
from owlfuse.core.types import JsonObject, Sample, without_keys
from owlfuse.data.formats.base import Source, field
from owlfuse.data.formats.marks import unescaped
from owlfuse.data.formats.records import (
    CHATS,
    NOT_METADATA,
    check_unused,
    history_turns,
    question_metadata,
    system_turn,
)
from owlfuse.data.formats.turn_keys import (
    IMAGES,
    QUESTION_REFUSED,
    THOUGHT_KEYS,
    VIDEOS,
    brief,
    is_absent,
    present_keys,
    tools_of,
)

USED_KEYS = frozenset({*NOT_METADATA, *CHATS, "instruction", "input", "output", "history"})
# Keys of a picture, a chat or a context, which this format would leave out.
OTHER_FORMATS = (*IMAGES, *VIDEOS, *CHATS, *QUESTION_REFUSED)


@dataclass(eq=False)
class Alpaca(Source):
    """Instructions and answers. A non-empty `input` follows the instruction on a line of its own,
    `history` and `system` stand before it. `<image>` and `\\<image>` are the word. Of a chat of one
    record, other fields are kept as metadata.

    Args:
        records_per_chat: how many records in a row make one chat, a turn each. Short instructions
            beside long chats about pictures are mostly padding otherwise.
    """

    records_per_chat: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.records_per_chat < 1:
            raise DataError(
                f"{self.file}: records_per_chat is {self.records_per_chat}, expected at least 1"
            )

    def __len__(self) -> int:
        return -(-len(self.records) // self.records_per_chat)

    def __getitem__(self, index: int) -> Sample:
        """See `Source`."""
        samples = [Source.__getitem__(self, record) for record in self.records_of(index)]
        first = samples[0]
        if len(samples) == 1:
            return first
        for sample in samples[1:]:
            # A chat has one system text and one list of tools, at its start.
            if sample.messages[0]["role"] == "system" or sample.tools != first.tools:
                raise DataError(
                    f"sample {sample.id} has a system text or tools, which a turn of a chat "
                    "cannot have: set records_per_chat to 1"
                )
        chat = Sample(f"{first.id}+{len(samples) - 1}", self.name, [], tools=first.tools)
        for sample in samples:
            for key in present_keys(sample.metadata, ("accepted", "kinds")):
                raise DataError(
                    f"sample {sample.id} has '{key}', which is of one question: set "
                    "records_per_chat to 1"
                )
            chat.messages += sample.messages
            chat.notes += sample.notes
        kinds = [sample.metadata.get("kind", "") for sample in samples]
        if any(kinds):
            chat.metadata["kinds"] = kinds
        return chat

    def first_record(self, index: int) -> int:
        """See `Source`."""
        return index * self.records_per_chat

    def records_of(self, index: int) -> range:
        """Return the indices of a chat's records."""
        first = self.first_record(index)
        return range(first, min(first + self.records_per_chat, len(self.records)))

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """See `Source`."""
        for index in indices:
            for _, identity in super().ids(self.records_of(index)):
                yield index, identity

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        # First, so that a record of another format is told as such. A truth value may say whether
        # the model is to think.
        thoughts = [key for key in THOUGHT_KEYS if isinstance(record.get(key), str)]
        for key in present_keys(record, (*OTHER_FORMATS, *thoughts)):
            raise DataError(
                f"sample {name} has '{key}': {brief(record[key])}, and the format alpaca has "
                "instruction, input and output alone; expected the format llava, sharegpt or "
                "messages, or no such key"
            )
        question = field(record, "instruction", str, name)
        extra = record.get("input")
        if not is_absent(extra):
            if not isinstance(extra, str):
                raise DataError(f"sample {name}: 'input' is {brief(extra)}, expected a text")
            question = f"{question}\n{extra}" if question else extra
        turns = [
            *system_turn(record, name, []),
            *history_turns(record.get("history"), name),
            {"role": "user", "content": question},
            {"role": "assistant", "content": field(record, "output", str, name)},
        ]
        messages = []
        for turn in turns:
            part = {"type": "text", "text": unescaped(turn["content"])}
            messages.append({"role": turn["role"], "content": [part]})
        metadata = without_keys(record, USED_KEYS)
        notes = check_unused(metadata, name, record)
        tools = tools_of(record, name)
        has_history = not is_absent(record.get("history"))
        metadata = question_metadata(metadata, messages, name, has_history)
        return Sample(name, self.name, messages, [], metadata, tools=tools, notes=notes)
