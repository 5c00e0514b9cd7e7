"""What a chat template writes around an answer: where the answer begins, what ends it, and where
a thought ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.data.chat.tokenizer import render

QUESTION, ANSWER, THOUGHT = "\ue001", "\ue000", "\ue002"
"""Private characters, which templates write as they are."""
THINK_TAGS = ("<think>", "</think>")
"""Around a thought that stands inside a content, as Qwen's, DeepSeek's and GLM's data have it."""


@dataclass(frozen=True)
class AnswerFormat:
    """How one tokenizer's chat template frames an answer, learned by rendering small chats.

    Training supervises, and generation stops, by the same marks.
    """

    header: str
    """What stands before an answer and its lead, the end of the question at least."""
    lead: str
    """What the template itself writes between header and answer, as Qwen3's empty thought; a
    part of the prompt."""
    end_mark: str
    """What ends an answer, without white space around it."""
    end_ids: tuple[int, ...]
    """The token that the end mark is; none where the mark is several ordinary tokens."""
    thought_end: str
    """What ends a thought, where the model writes one before its answer."""

    @classmethod
    def of(cls, tokenizer: Any) -> AnswerFormat:
        """Learns the format of a prepared tokenizer (see `chat_tokenizer.prepare`).

        Raises:
            DataError: a template that writes no answer, or nothing behind it, by which a model
                could learn to end it.
        """
        asked = [{"role": "user", "content": QUESTION}]
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        where = f"the chat template of the tokenizer {tokenizer.name_or_path}"
        try:
            prompt = render(tokenizer, asked, True, without_lead=True)
            whole = render(tokenizer, answered)
            lead = render(tokenizer, asked, True).removeprefix(prompt)
            question_alone = render(tokenizer, asked)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if whole.count(ANSWER) != 1:
            raise DataError(
                f"{where} writes an answer {whole.count(ANSWER)} times, expected once: it makes "
                f"{whole[:120]!r}"
            )
        generation_prompt = prompt.removeprefix(question_alone)
        # none, or a question that is rendered otherwise alone
        if generation_prompt in ("", prompt):
            generation_prompt = prompt.rpartition(QUESTION)[2]
        end_mark = ended_by(tokenizer, answered, whole)
        if not end_mark:
            raise DataError(
                f"{where} writes nothing behind an answer, so a model cannot learn to end it: "
                "write eos_token behind it"
            )
        end = whole.index(ANSWER) + len(ANSWER)
        return cls(
            header=generation_prompt,
            lead=lead,
            end_mark=end_mark,
            end_ids=end_tokens(tokenizer, whole, whole.index(end_mark, end), end_mark),
            thought_end=thought_ended_by(tokenizer, asked),
        )

    def answer_start(self, before: str) -> int:
        """Where an answer begins at the end of `before`, what is rendered up to its own first
        character.

        It begins behind header and lead. What is left, white space, the model writes.
        """
        place = before.rfind(self.header + self.lead)
        if place >= 0:
            return place + len(self.header + self.lead)
        place = before.rfind(self.header)
        if place >= 0:
            return place + len(self.header)
        return len(before.rstrip())

    def starts(self, text: str) -> list[int]:
        """The places in a rendered chat at which answers begin: tokens do not stand across them."""
        places = []
        place = text.find(self.header) if self.header.strip() else -1
        while place >= 0:
            start = place + len(self.header)
            places.append(start)
            if self.lead and text.startswith(self.lead, start):
                places.append(start + len(self.lead))
            place = text.find(self.header, start)
        return places

    def generation(self, tokenizer: Any, llm: Any = None) -> dict[str, Any]:
        """The fields of a generation configuration: what ends an answer, and the padding.

        Args:
            llm: a causal LM; of the ends in its own generation configuration those that are control
                tokens count too.
        """
        own = getattr(getattr(llm, "generation_config", None), "eos_token_id", None)
        own_ids = own if isinstance(own, list) else [] if own is None else [own]
        special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        ids = [
            *self.end_ids,
            tokenizer.eos_token_id,
            *(number for number in own_ids if number in special),
        ]
        fields = {"eos_token_id": list(dict.fromkeys(ids)), "pad_token_id": tokenizer.pad_token_id}
        return fields if self.end_ids else {**fields, "stop_strings": [self.end_mark]}

    def answers(self, tokenizer: Any, rows: Sequence[Any], thinking: bool = False) -> list[str]:
        """The answers in rows of generated ids, without what ends them and, with `thinking`,
        without the thought."""
        return [self.answer(tokenizer, row, thinking) for row in rows]

    def answer(self, tokenizer: Any, ids: Any, thinking: bool = False) -> str:
        """The answer in generated ids (L,)."""
        ids = [int(number) for number in ids]
        if thinking:
            ids = self.behind_thought(tokenizer, ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not self.end_ids:
            text = text.partition(self.end_mark)[0]
        return text.strip()

    def behind_thought(self, tokenizer: Any, ids: list[int]) -> list[int]:
        """The ids behind the end of the thought; all of them where the model wrote none."""

        def thought_ended(count: int) -> bool:
            return self.thought_end in tokenizer.decode(ids[:count], skip_special_tokens=False)

        end = bisect_left(range(len(ids) + 1), True, key=thought_ended)
        return ids[end:] if end <= len(ids) else ids


def ended_by(tokenizer: Any, answered: list[dict[str, str]], whole: str) -> str:
    """What a template writes behind every answer, without white space: what is the same behind
    the last and an earlier one."""
    closing = whole.partition(ANSWER)[2]
    try:
        longer = render(
            tokenizer,
            [*answered, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        )
    except DataError:
        return closing.strip()
    following = longer.partition(ANSWER)[2]
    first, second = (tokens_of(tokenizer, text) for text in (closing, following))
    length = 0
    for one, other in zip(first, second):
        if one != other:
            break
        length = one[2]
    return closing[:length].strip() or closing.strip()


def tokens_of(tokenizer: Any, text: str) -> list[tuple[int, int, int]]:
    """Each token of a text: its id, and the characters that it stands for, first and behind the
    last."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (number, *offsets)
        for number, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def end_tokens(tokenizer: Any, text: str, start: int, end_mark: str) -> tuple[int, ...]:
    """The one token by which an end mark at `start` is known; none where it takes several
    ordinary tokens."""
    end = start + len(end_mark)
    inside = [token for token in tokens_of(tokenizer, text) if token[2] > start and token[1] < end]
    number, first, _ = inside[0]
    added = tokenizer.added_tokens_decoder.get(number)
    special = added is not None and added.special
    if not text[first:start].strip() and (special or len(inside) == 1):
        return (number,)
    return ()


def thought_ended_by(tokenizer: Any, asked: list[dict[str, str]]) -> str:
    """What a template writes behind a thought, `</think>` where it knows of none."""
    thought = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    try:
        text = render(tokenizer, [*asked, thought])
    except DataError:
        return THINK_TAGS[1]
    behind, found, _ = text.partition(THOUGHT)[2].partition(ANSWER)
    return behind.strip() if found and behind.strip() else THINK_TAGS[1]
