"""Chats become token ids and labels, by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from owlfuse.core.errors import DataError
from owlfuse.core.types import IMAGE, VISUAL, Encoded, Message, Note, Part, Sample, without_keys
from owlfuse.data.chat.answer_format import THINK_TAGS, AnswerFormat
from owlfuse.data.chat.checks import control_tokens, flatten, unwritten_roles
from owlfuse.data.chat.supervision import cut_at_borders, supervised_spans
from owlfuse.data.chat.tokenizer import encode, prepare, render
from owlfuse.data.chat.truncation import OnLength, over_length, truncate
from owlfuse.data.words import show_words, spell_words

UNKNOWN = Note("unused", "characters that the tokenizer does not have, which it writes as <unk>")


class ChatEncoder:
    """Encodes chats: the template decides the text, only assistant turns with their end marks are
    supervised, and each image placeholder grows to the fusion's tokens per image.

    Args:
        tokenizer: gets what it lacks for chats, see `chat_tokenizer.prepare`.
        max_length: in tokens, placeholders expanded. For a longer sample see `encode`.
        thinking: prompts ask for a thought before the answer, where the template knows of thoughts.
        image_token: what stands for an image in the tokenizer.

    Raises:
        DataError: a tokenizer without a chat template, without an end-of-sequence token, or without
            offsets; a template that cannot be supervised.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_image: int,
        max_length: int = 2048,
        thinking: bool = False,
        image_token: str = IMAGE,
    ) -> None:
        self.tokenizer = prepare(tokenizer, image_token)
        self.answer_format = AnswerFormat.of(tokenizer)
        self.image_token = image_token
        self.image_id: Any = tokenizer.convert_tokens_to_ids(image_token)
        self.pad_id: Any = tokenizer.pad_token_id
        self.unknown_id = unknown_id(tokenizer)
        self.control_tokens = control_tokens(tokenizer, image_token)
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self.thinking = thinking

    def encode(
        self, sample: Sample, views: list[int] | None = None, on_length: OnLength = "error"
    ) -> Encoded:
        """Return the whole chat, its assistant turns supervised; with `truncate_turns`, its first
        turns that fit.

        Args:
            views: how many images each placeholder stands for; by default one each.

        Raises:
            DataError: names the sample, what was found and what was expected.
        """
        # Its length is known only when it is encoded.
        encoded = self.encode_any_length(sample, views)
        if len(encoded.input_ids) <= self.max_length:
            return encoded
        if on_length == "truncate_turns":
            encode = partial(self.encode_any_length, views=views)
            return truncate(encode, sample, self.max_length)
        raise over_length(sample, len(encoded.input_ids), self.max_length, on_length)

    def encode_any_length(self, sample: Sample, views: list[int] | None) -> Encoded:
        """Return the chat whatever its length is; where `views` has more entries than the chat
        placeholders, the first count.

        Raises DataError.
        """
        messages = flatten(sample, self.control_tokens, self.image_token)
        text = self.render(sample, messages)
        without_tools = self.text_without_tools(sample, messages)
        # Before the spans, whose error would not say what the template leaves out.
        self.check_written(sample, messages, text, without_tools)
        render_sample = partial(self.render, sample)
        spans = supervised_spans(sample, messages, text, render_sample, self.answer_format)
        first_answer = spans[0][0]
        # As Mistral's templates do: calls would be learned by a model that is told of no tools.
        if without_tools is not None and text[:first_answer] == without_tools[:first_answer]:
            raise DataError(
                f"sample {sample.id}: the chat template writes the tools behind an answer, which "
                "would be learned without them; take another chat_template, or write loss: false "
                "at the answers before the last question"
            )
        self.note_inner_marks(sample, text, spans)
        starts = [start for start, _ in spans]
        ids, offsets = self.tokenize(text, starts, sample.id)
        labels = self.labels(sample, ids, offsets, spans)
        if self.unknown_id in ids and UNKNOWN not in sample.notes:
            sample.notes.append(UNKNOWN)
        return self.expand(sample, ids, labels, views)

    def text_without_tools(self, sample: Sample, messages: list[Message]) -> str | None:
        """Return the chat as it is rendered without its tools; None where it has none, and of a
        template that refuses it so."""
        if not sample.tools:
            return None
        with suppress(DataError):
            return self.render(replace(sample, tools=None), messages)
        return None

    def note_inner_marks(self, sample: Sample, text: str, spans: list[tuple[int, int]]) -> None:
        """Note an answer that has the end mark in it, where that is ordinary text."""
        mark = self.answer_format.end_mark
        if self.answer_format.end_ids:
            return
        note = Note("assumed", f"an answer has {mark!r} in it, at which generation stops")
        has_mark = any(mark in text[start : end - len(mark)] for start, end in spans)
        if has_mark and note not in sample.notes:
            sample.notes.append(note)

    def encode_prompt(self, sample: Sample, views: list[int] | None = None) -> Encoded:
        """Return the chat up to where the assistant answers next; nothing is supervised.

        Raises DataError.
        """
        messages = flatten(sample, self.control_tokens, self.image_token)
        text = self.render(sample, messages, True, thinking=self.thinking)
        # No borders: where the prompt ends, nothing follows that a token could cross.
        ids, _ = self.tokenize(text, name=sample.id)
        encoded = self.expand(sample, ids, [-100] * len(ids), views)
        if len(encoded.input_ids) > self.max_length:
            raise over_length(sample, len(encoded.input_ids), self.max_length, "error")
        return encoded

    def render(
        self,
        sample: Sample,
        messages: list[Message],
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """Return a chat as text.

        Raises DataError with what the template objects to, a system message for instance.
        """
        if sample.tools:
            options["tools"] = sample.tools
        # A mark for the labels, of which templates know nothing.
        messages = [without_keys(message, ["supervised"]) for message in messages]
        try:
            return render(self.tokenizer, messages, add_generation_prompt, **options)
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error

    def check_written(
        self, sample: Sample, messages: list[Message], text: str, without_tools: str | None
    ) -> None:
        """Raise DataError where the template leaves out tools, their calls or thoughts: the text is
        the same without them. Of names and ids of calls it is a note of the sample."""
        unwritten = []
        for key in ("tool_calls", "tool_calls.id", "reasoning_content", "name", "tool_call_id"):
            if not any(key.partition(".")[0] in message for message in messages):
                continue
            without = [without_key(message, key) for message in messages]
            # A template that refuses the chat without them writes them.
            with suppress(DataError):
                if without != messages and text == self.render(sample, without):
                    unwritten.append(key)
        unwritten += unwritten_roles(messages, text, partial(self.render, sample))
        for key in ("name", "tool_call_id", "tool_calls.id"):
            note = Note("unused", f"a turn's '{key}', which the chat template does not write")
            if key in unwritten:
                unwritten.remove(key)
                # A chat that is cut is encoded several times.
                if note not in sample.notes:
                    sample.notes.append(note)
        if text == without_tools:
            unwritten.append("tools")
        if unwritten:
            raise DataError(
                f"sample {sample.id} has {' and '.join(unwritten)}, which the chat template does "
                "not write; take a chat_template that does, or leave them out of the data"
            )

    def tokenize(
        self, text: str, borders: list[int] | None = None, name: str = ""
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and the characters that each stands for. What comes before an answer has the
        tokens that it has as a prompt.

        Args:
            text: rendered, words hidden as `flatten` hides them.
            borders: where answers begin, beside those that their header marks.
            name: the sample's, for messages.

        Raises:
            DataError: the word <image> in a text, where the tokenizer cannot write it.
        """
        shown = show_words(text, self.image_token)
        ids, offsets = encode(self.tokenizer, shown)
        all_borders = [*self.answer_format.starts(shown), *(borders or [])]
        cut_at_borders(self.tokenizer, shown, ids, offsets, all_borders)
        spell_words(self.tokenizer, self.image_token, text, ids, offsets, f"sample {name}")
        return ids, offsets

    def labels(
        self,
        sample: Sample,
        ids: list[int],
        offsets: list[tuple[int, int]],
        spans: list[tuple[int, int]],
    ) -> list[int]:
        """Return the ids of the tokens that begin inside the spans, -100 elsewhere.

        A token that ends behind a span is the end mark with the white space that some tokenizers
        count to it (Phi-3's). One across a span's start, which could not be split, is a DataError.
        """
        labels = [-100] * len(ids)
        # Spans and tokens both ascend, so that one pass is enough.
        index = 0
        for start, end in spans:
            while index < len(ids) and offsets[index][0] < end:
                first, last = offsets[index]
                if first >= start:
                    labels[index] = ids[index]
                elif last > start:
                    token = self.tokenizer.convert_ids_to_tokens(ids[index])
                    raise DataError(
                        f"sample {sample.id}: token {token!r} stands across the border of an answer"
                    )
                index += 1
        return labels

    def answers(self, rows: Sequence[Any]) -> list[str]:
        """Return the answers in rows of generated ids: see `AnswerFormat.answer`."""
        return [self.answer_format.answer(self.tokenizer, row, self.thinking) for row in rows]

    def unfinished_thoughts(self, rows: Sequence[Any]) -> list[bool]:
        """Return of each row of generated ids whether it is a thought that did not end."""
        unfinished = []
        for row in rows:
            unfinished.append(
                self.answer_format.is_unfinished_thought(self.tokenizer, row, self.thinking)
            )
        return unfinished

    def cut_answers(self, rows: Sequence[Any], llm: Any) -> list[bool]:
        """Return of each row of ids that an LLM has generated whether it did not end."""
        ends = self.answer_format.generation(self.tokenizer, llm)["eos_token_id"]
        return [self.answer_format.is_cut(self.tokenizer, row, ends) for row in rows]

    def expand(
        self,
        sample: Sample,
        ids: list[int],
        labels: list[int],
        views: list[int] | None,
    ) -> Encoded:
        """Return a sample with each placeholder as `tokens_per_image` positions for each of its
        `views` (by default one)."""
        placeholders = ids.count(self.image_id)
        expected = len(sample.images) + len(sample.videos)
        # A chat that was cut has lost its last pictures, whose views are still counted.
        views = [1] * expected if views is None else views[:expected]
        if placeholders != expected or len(views) != expected:
            raise DataError(
                f"sample {sample.id}: {len(sample.images)} images and {len(sample.videos)} videos "
                f"became {placeholders} placeholders"
            )
        expanded_ids: list[int] = []
        expanded_labels: list[int] = []
        positions: list[int] = []
        counts = iter(views)
        for token, label in zip(ids, labels, strict=True):
            repeat = 1
            if token == self.image_id:
                repeat = next(counts) * self.tokens_per_image
                start = len(expanded_ids)
                positions += range(start, start + repeat, self.tokens_per_image)
            expanded_ids += [token] * repeat
            expanded_labels += [label] * repeat
        # Words <image> are spelled by other tokens, so that each image token is a placeholder.
        input_ids = torch.tensor(expanded_ids)
        placeholder = input_ids == self.image_id
        label_ids = torch.tensor(expanded_labels)
        return Encoded(sample.id, sample.source, input_ids, label_ids, placeholder, [], positions)


def led_by_break(content: list[Part], after_pictures: bool) -> list[Message]:
    """Return a question's parts, whose first text begins with a line break behind pictures of
    earlier turns, and with none elsewhere."""
    if not content or content[0]["type"] != "text":
        return content
    text = ("\n" if after_pictures else "") + content[0]["text"].lstrip("\n")
    return [{"type": "text", "text": text}, *content[1:]]


def has_break_behind_visuals(turns: list[Message]) -> bool:
    """Return whether a chat begins a text that stands behind a picture or a video on a new line."""
    for turn in turns:
        for part, next_part in pairwise(turn["content"]):
            if part["type"] in VISUAL and next_part.get("text", "").startswith("\n"):
                return True
    return False


def answer_text(message: Message) -> str:
    """Return the text of an answer, without a thought inside of it."""
    text = "".join(part.get("text", "") for part in message["content"])
    if THINK_TAGS[1] not in text:
        return text
    return text.rpartition(THINK_TAGS[1])[2].lstrip("\n")


def without_key(message: Message, key: str) -> Message:
    """Return a message without a key; without `tool_calls.id`, its calls have no ids."""
    key, _, inner = key.partition(".")
    if not inner or key not in message:
        return without_keys(message, [key])
    return {**message, key: [without_keys(call, [inner]) for call in message[key]]}


def unknown_id(tokenizer: Any) -> int | None:
    """Return the id of the token for characters that a tokenizer does not have; None where it has
    none of its own, as GPT-2's, which is the end of the sequence."""
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
