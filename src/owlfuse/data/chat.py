"""Chats -> token ids and labels, by the tokenizer's own chat template."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from owlfuse.data.formats.base import IMAGE
from owlfuse.data.pictures import VISUAL, visual_parts
from owlfuse.types import DataError, Encoded, Sample


class ChatEncoder:
    """Encodes chats: the template decides the text, only assistant turns with their end marks are supervised, and each image
    placeholder grows to the fusion's tokens per image.

    Args:
        max_length: in tokens, placeholders expanded. A longer sample is a DataError.

    Raises:
        DataError: a tokenizer without a chat template or without an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int, max_length: int = 2048) -> None:
        if not tokenizer.chat_template:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} has no chat template, which decides a chat's text")
        if not tokenizer.is_fast:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} is not a fast one, which character offsets need")
        if IMAGE not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        self.tokenizer = tokenizer
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length

    def encode(self, sample: Sample, views: list[int] | None = None) -> Encoded:
        """The whole chat, its assistant turns supervised.

        Args:
            views: how many images each placeholder stands for; by default one each.

        Raises:
            DataError: names the sample, what was found and what was expected.
        """
        messages = self.flatten(sample)
        (text,) = self.render([messages])
        spans = self.supervised_spans(sample, messages, text)
        ids, offsets = self.tokenize(text)
        labels = self.labels(sample, ids, offsets, spans)
        return self.expand(sample, ids, labels, views)

    def encode_prompt(self, sample: Sample, views: list[int] | None = None) -> Encoded:
        """The chat up to where the assistant answers next; nothing is supervised."""
        (text,) = self.render([self.flatten(sample)], add_generation_prompt=True)
        ids, _ = self.tokenize(text)
        return self.expand(sample, ids, [-100] * len(ids), views)

    def flatten(self, sample: Sample) -> list[dict[str, str]]:
        """Messages with the parts of each joined to one text, as every chat template takes them."""
        if not sample.messages:
            raise DataError(f"sample {sample.id} has no messages")
        for message in sample.messages:
            for part in message["content"]:
                found = [token for token in self.control if token in part.get("text", "")]
                if found:
                    raise DataError(f"sample {sample.id} holds the tokenizer's control token {found[0]} in its text")
        visual_parts(sample)
        return [
            {"role": m["role"], "content": "".join(IMAGE if p["type"] in VISUAL else p["text"] for p in m["content"])}
            for m in sample.messages
        ]

    def render(self, chats: list[list[dict[str, str]]], add_generation_prompt: bool = False) -> list[str]:
        """Chats as text, several in one call, which costs little more than one."""
        return self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=add_generation_prompt)

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters that each stands for."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], encoding["offset_mapping"]

    def supervised_spans(self, sample: Sample, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
        """The characters of each assistant turn: its answer and end mark, without white space after it."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise DataError(f"sample {sample.id} has no assistant turn, so there is nothing to learn from it")
        prompts = self.render([messages[:index] for index in answers], add_generation_prompt=True)
        turns = self.render([messages[: index + 1] for index in answers])
        spans = []
        for index, prompt, turn in zip(answers, prompts, turns, strict=True):
            if not turn.startswith(prompt) or not text.startswith(turn.rstrip()):
                raise DataError(
                    f"sample {sample.id}: the chat template renders turn {index} otherwise alone than in the whole chat, so "
                    "that its answer cannot be told from the prompt"
                )
            end = len(turn.rstrip())
            if not messages[index]["content"].strip() or end <= len(prompt):
                raise DataError(f"sample {sample.id}: turn {index} is an empty answer")
            spans.append((len(prompt), end))
        return spans

    def labels(self, sample: Sample, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
        """The ids inside the spans, -100 elsewhere. A token across a span's border is a DataError."""
        labels = [-100] * len(ids)
        index = 0
        for start, end in spans:
            while index < len(ids) and offsets[index][0] < end:
                first, last = offsets[index]
                if first >= start and last <= end:
                    labels[index] = ids[index]
                elif last > start:
                    token = self.tokenizer.convert_ids_to_tokens(ids[index])
                    raise DataError(f"sample {sample.id}: token {token!r} stands across the border of an answer")
                index += 1
        return labels

    def expand(self, sample: Sample, ids: list[int], labels: list[int], views: list[int] | None = None) -> Encoded:
        """Each placeholder as `tokens_per_image` positions for each of its `views` (by default one)."""
        found, expected = ids.count(self.image_id), len(sample.images) + len(sample.videos)
        views = [1] * expected if views is None else views
        if found != expected or len(views) != expected:
            raise DataError(
                f"sample {sample.id}: {len(sample.images)} images and {len(sample.videos)} videos became {found} placeholders"
            )
        out_ids: list[int] = []
        out_labels: list[int] = []
        positions: list[int] = []
        counts = iter(views)
        for token, label in zip(ids, labels, strict=True):
            repeat = 1
            if token == self.image_id:
                repeat = next(counts) * self.tokens_per_image
                positions += range(len(out_ids), len(out_ids) + repeat, self.tokens_per_image)
            out_ids += [token] * repeat
            out_labels += [label] * repeat
        if len(out_ids) > self.max_length:
            raise DataError(f"sample {sample.id} is {len(out_ids)} tokens long, over max_length of {self.max_length}")
        input_ids = torch.tensor(out_ids)
        return Encoded(sample.id, sample.source, input_ids, torch.tensor(out_labels), input_ids == self.image_id, [], positions)


def question_samples(sample: Sample) -> list[tuple[Sample, str, str]]:
    """Each question of a chat by itself, with its answer and its kind ("" where the data name none): pictures of the turns
    before it come first, its own stay where they stand in its text. What was said in between is left out, so that no answer
    gives another away."""
    questions = []
    seen: list[dict[str, Any]] = []
    system = [message for message in sample.messages if message["role"] == "system"]
    before = [part["type"] for message in system for part in message["content"]]
    kinds: list[Any] = sample.metadata.get("kinds") or [sample.metadata.get("kind", "")]
    turns = [m for m in sample.messages if m["role"] != "system"]
    for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        own = list(asked["content"])
        if own and own[0]["type"] == "text":
            own[0] = {"type": "text", "text": ("\n" if seen else "") + own[0]["text"].lstrip("\n")}
        messages = [*system, {"role": "user", "content": [*seen, *own]}]
        answer = "".join(part.get("text", "") for part in answered["content"])
        seen += [part for part in asked["content"] if part["type"] in VISUAL]
        types = [*before, *(part["type"] for part in seen)]
        images, videos = sample.images[: types.count("image")], sample.videos[: types.count("video")]
        question = Sample(f"{sample.id}#{number}", sample.source, messages, images, videos=videos)
        questions.append((question, answer, str(kinds[number % len(kinds)])))
        seen += [part for part in answered["content"] if part["type"] in VISUAL]
    return questions
