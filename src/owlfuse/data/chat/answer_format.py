"""The text that a chat template writes around an answer: its header, its end mark, and the end of
a thought."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.data.chat.tokenizer import encode, render

# Private characters, which templates write as they are.
QUESTION, ANSWER, THOUGHT = "\ue001", "\ue000", "\ue002"
# Tags around a thought inside of a content, as Qwen's, DeepSeek's and GLM's data have it.
THINK_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class AnswerFormat:
    """How one tokenizer's chat template frames an answer, learned by rendering small chats.

    Training supervises, and generation stops, by the same marks.
    """

    header: str
    """The text before an answer and its lead: the end of the question at least."""
    lead: str
    """The text that the template itself writes between header and answer, as Qwen3's empty thought;
    a part of the prompt."""
    end_mark: str
    """The text that ends an answer, without white space around it."""
    end_ids: tuple[int, ...]
    """The token of the end mark; none where the mark is several ordinary tokens."""
    thought_start: str
    """The text that begins a thought, where the model writes one before its answer."""
    thought_end: str
    """The text that ends a thought."""
    thought_opened: bool
    """Whether a prompt that asks for a thought ends with its beginning."""

    @classmethod
    def of(cls, tokenizer: Any) -> AnswerFormat:
        """Learn the format of a prepared tokenizer (see `tokenizer.prepare`).

        Raises:
            DataError: a template that writes no answer, or nothing behind it, by which a model
                could learn to end it.
        """
        question = [{"role": "user", "content": QUESTION}]
        chat = [*question, {"role": "assistant", "content": ANSWER}]
        template = f"the chat template of the tokenizer {tokenizer.name_or_path}"
        try:
            prompt = render(tokenizer, question, True, without_lead=True)
            text = render(tokenizer, chat)
            lead = render(tokenizer, question, True).removeprefix(prompt)
            question_alone = render(tokenizer, question)
            thinking_prompt = render(tokenizer, question, True, thinking=True)
        except DataError as error:
            raise DataError(f"{template}: {error}") from error
        if text.count(ANSWER) != 1:
            raise DataError(
                f"{template} writes an answer {text.count(ANSWER)} times, expected once: it makes "
                f"{text[:120]!r}"
            )
        header = prompt.removeprefix(question_alone)
        # no generation prompt, or a question that is rendered otherwise alone
        if header in ("", prompt):
            header = prompt.rpartition(QUESTION)[2]
        end_mark = find_end_mark(tokenizer, chat, text)
        if not end_mark:
            raise DataError(
                f"{template} writes nothing behind an answer, so a model cannot learn to end it: "
                "write eos_token behind it"
            )
        # behind the answer, since a question may end with the same mark
        end = text.index(end_mark, text.index(ANSWER) + len(ANSWER))
        thought_start, thought_end = find_thought_marks(tokenizer, question, thinking_prompt)
        return cls(
            header=header,
            lead=lead,
            end_mark=end_mark,
            end_ids=end_tokens(tokenizer, text, end, end_mark),
            thought_start=thought_start,
            thought_end=thought_end,
            thought_opened=thinking_prompt.rstrip().endswith(thought_start),
        )

    def answer_start(self, before: str) -> int:
        """Return where an answer begins at the end of `before`, the rendered text up to its first
        character.

        It begins behind header and lead. White space behind them is the model's to write.
        """
        opening = self.header + self.lead
        # from the right, since earlier answers have the same opening
        position = before.rfind(opening)
        if position >= 0:
            return position + len(opening)
        position = before.rfind(self.header)
        if position >= 0:
            return position + len(self.header)
        # Before an earlier answer a template may write the beginning of the header alone
        # (Qwen3-Thinking, without <think>).
        for length in range(len(self.header), 0, -1):
            beginning = self.header[:length]
            if beginning.strip() and before.endswith(beginning):
                return len(before)
        return len(before.rstrip())

    def starts(self, text: str) -> list[int]:
        """Return the positions in a rendered chat at which answers begin, which no token may
        cross."""
        if not self.header.strip():
            return []
        positions = []
        header = text.find(self.header)
        while header >= 0:
            start = header + len(self.header)
            positions.append(start)
            if self.lead and text.startswith(self.lead, start):
                positions.append(start + len(self.lead))
            header = text.find(self.header, start)
        return positions

    def generation(self, tokenizer: Any, llm: Any = None) -> dict[str, Any]:
        """Return the fields of a generation configuration: the tokens or texts that end an answer,
        and the padding.

        Args:
            llm: a causal LM; of the ends in its own generation configuration those that are control
                tokens count too.
        """
        llm_ends = getattr(getattr(llm, "generation_config", None), "eos_token_id", None)
        # transformers has one id there, or a list.
        if not isinstance(llm_ends, list):
            llm_ends = [] if llm_ends is None else [llm_ends]
        ids = [*self.end_ids, tokenizer.eos_token_id]
        added = tokenizer.added_tokens_decoder
        ids += [number for number in llm_ends if number in added and added[number].special]
        fields = {"eos_token_id": list(dict.fromkeys(ids)), "pad_token_id": tokenizer.pad_token_id}
        if not self.end_ids:
            fields["stop_strings"] = [self.end_mark]
        return fields

    def answer(self, tokenizer: Any, ids: Any, thinking: bool = False) -> str:
        """Return the answer in generated ids (L,), without its end mark and without the thought
        that a model asked for one, or one that learned to think, writes before it; empty where the
        thought did not end.

        Args:
            thinking: the prompt asked for a thought.
        """
        ids = [int(number) for number in ids]
        if thinking or self.begins_thought(tokenizer, ids):
            if self.is_unfinished_thought(tokenizer, ids, thinking):
                return ""
            ids = self.behind_thought(tokenizer, ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # Of tokens that are not marked as special, which decoding does not leave out.
        return text.partition(self.end_mark)[0].strip()

    def is_cut(self, tokenizer: Any, ids: Any, ends: Sequence[int]) -> bool:
        """Return whether generated ids (L,) have no end: neither a token of `ends` nor, where it is
        of ordinary tokens, the end mark."""
        ids = [int(number) for number in ids]
        if not set(ends).isdisjoint(ids):
            return False
        return bool(self.end_ids) or self.end_mark not in tokenizer.decode(
            ids, skip_special_tokens=True
        )

    def begins_thought(self, tokenizer: Any, ids: Any) -> bool:
        """Return whether generated ids (L,) begin with a thought."""
        text = tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)
        return text.lstrip().startswith(self.thought_start)

    def is_unfinished_thought(self, tokenizer: Any, ids: Any, thinking: bool = False) -> bool:
        """Return whether generated ids (L,) are a thought alone: it was begun, by the model or by a
        prompt that asks for one (`thinking`), and did not end."""
        prompt_began = thinking and self.thought_opened
        if not prompt_began and not self.begins_thought(tokenizer, ids):
            return False
        text = tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)
        return self.thought_end not in text

    def behind_thought(self, tokenizer: Any, ids: list[int]) -> list[int]:
        """Return the ids behind the end of the thought; all of them where the model wrote none."""

        def thought_ended(count: int) -> bool:
            return self.thought_end in tokenizer.decode(ids[:count], skip_special_tokens=False)

        # By decoded prefixes: the mark may be several tokens, which depend on their neighbours.
        end = bisect_left(range(len(ids) + 1), True, key=thought_ended)
        return ids[end:] if end <= len(ids) else ids


def find_end_mark(tokenizer: Any, chat: list[dict[str, str]], text: str) -> str:
    """Return the text that a template writes behind every answer, without white space: the tokens
    that are the same behind the last answer and an earlier one."""
    closing = text.partition(ANSWER)[2]
    # Another answer shows which text is behind every answer and which behind the last.
    following = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        longer_text = render(tokenizer, [*chat, *following])
    except DataError:
        return closing.strip()
    last_tokens = zip(*encode(tokenizer, closing))
    earlier_tokens = zip(*encode(tokenizer, longer_text.partition(ANSWER)[2]))
    length = 0
    for last_token, earlier_token in zip(last_tokens, earlier_tokens):
        if last_token != earlier_token:
            break
        _, (_, length) = last_token
    return closing[:length].strip() or closing.strip()


def end_tokens(
    tokenizer: Any,
    text: str,
    start: int,
    end_mark: str,
) -> tuple[int, ...]:
    """Return the one token that marks an end at `start`; none where the end mark is of ordinary
    tokens, which may be joined with the answer's last characters."""
    end = start + len(end_mark)
    inside = []
    for number, (first, last) in zip(*encode(tokenizer, text)):
        if last > start and first < end:
            inside.append((number, first))
    number, first = inside[0]
    added = tokenizer.added_tokens_decoder.get(number)
    is_special = added is not None and added.special
    is_whole = added is not None and len(inside) == 1
    # A control token is enough to stop at, whatever text the template writes behind it.
    if not text[first:start].strip() and (is_special or is_whole):
        return (number,)
    return ()


def find_thought_marks(
    tokenizer: Any, question: list[dict[str, str]], prompt: str
) -> tuple[str, str]:
    """Return the texts that a template writes before and behind a thought, THINK_TAGS where it
    knows of none.

    Args:
        prompt: the question, rendered as one that asks for a thought.
    """
    thought = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    try:
        text = render(tokenizer, [*question, thought])
    except DataError:
        return THINK_TAGS
    before, _, behind = text.partition(THOUGHT)
    end, answer, _ = behind.partition(ANSWER)
    if not answer or not end.strip():
        return THINK_TAGS
    # A prompt may hold the beginning already.
    start = before.removeprefix(prompt).strip() if before.startswith(prompt) else ""
    return start or THINK_TAGS[0], end.strip()
