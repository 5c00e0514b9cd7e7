"""Chats -> token ids and labels, by the tokenizer's own chat template."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from owlfuse.data.borders import split_tokens
from owlfuse.data.chat_template import template_names
from owlfuse.data.checks import flatten
from owlfuse.data.formats.base import IMAGE
from owlfuse.data.gguf_tokenizer import gguf_tokenizer
from owlfuse.data.pictures import VISUAL
from owlfuse.data.spans import supervised_spans
from owlfuse.data.truncation import OnLength, over_length, truncate
from owlfuse.packages import packaged
from owlfuse.types import DataError, Encoded, Sample


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a hub name or a GGUF file; `package:` names are those of installed packages' files.

    Raises:
        DataError: there is none.
        ModuleNotFoundError: a package that is not installed.
    """
    try:
        path = packaged(name)
        return (
            gguf_tokenizer(Path(path).expanduser())
            if path.endswith(".gguf")
            else AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer: {name}: {str(error).splitlines()[0]}") from error


class ChatEncoder:
    """Encodes chats: the template decides the text, only assistant turns with their end marks are supervised, and each image
    placeholder grows to the fusion's tokens per image.

    Args:
        max_length: in tokens, placeholders expanded. What becomes of a longer sample, `encode` is told.

    Raises:
        DataError: a tokenizer without a chat template, without an end-of-sequence token, or without offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int, max_length: int = 2048) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, which decides a chat's text; name one: "
                f"chat_template={'|'.join(template_names())}|<path of a .jinja file>"
            )
        if not tokenizer.is_fast:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} is not a fast one, which character offsets need")
        if tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, which ends an answer")
        if IMAGE not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        self.tokenizer = tokenizer
        self.image_id: Any = tokenizer.convert_tokens_to_ids(IMAGE)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length

    def encode(self, sample: Sample, views: list[int] | None = None, on_length: OnLength = "error") -> Encoded:
        """The whole chat, its assistant turns supervised; with `truncate_turns`, its first turns that fit.

        Args:
            views: how many images each placeholder stands for; by default one each.

        Raises:
            DataError: names the sample, what was found and what was expected.
        """
        encoded = self.encode_whole(sample, views)
        if len(encoded.input_ids) <= self.max_length:
            return encoded
        if on_length == "truncate_turns":
            return truncate(partial(self.encode_whole, views=views), sample, self.max_length)
        raise over_length(sample, len(encoded.input_ids), self.max_length, on_length)

    def encode_whole(self, sample: Sample, views: list[int] | None = None) -> Encoded:
        """The chat whatever its length; of `views` those of its own placeholders, the first. Raises DataError."""
        messages = flatten(sample, self.control)
        text = self.render(sample, messages)
        spans = supervised_spans(sample, messages, text, partial(self.render, sample))
        ids, offsets = self.tokenize(text)
        for border in sorted({border for span in spans for border in span}, reverse=True):
            split_tokens(self.tokenizer, text, ids, offsets, border)
        return self.expand(sample, ids, self.labels(sample, ids, offsets, spans), views)

    def encode_prompt(self, sample: Sample, views: list[int] | None = None) -> Encoded:
        """The chat up to where the assistant answers next; nothing is supervised. Raises DataError."""
        ids, _ = self.tokenize(self.render(sample, flatten(sample, self.control), True))
        encoded = self.expand(sample, ids, [-100] * len(ids), views)
        if len(encoded.input_ids) > self.max_length:
            raise over_length(sample, len(encoded.input_ids), self.max_length, "error")
        return encoded

    def render(self, sample: Sample, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """A chat as text. Raises DataError with what the template objects to, a system message for instance."""
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]  # a text, where it makes no tokens
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(f"sample {sample.id}: the chat template refuses it: {error}") from error

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters that each stands for."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], encoding["offset_mapping"]

    def labels(self, sample: Sample, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
        """The ids inside the spans, -100 elsewhere. A token across a span's border that could not be split is a DataError."""
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
        views = [1] * expected if views is None else views[:expected]
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
        input_ids = torch.tensor(out_ids)
        return Encoded(sample.id, sample.source, input_ids, torch.tensor(out_labels), input_ids == self.image_id, [], positions)


def accepted_by(sample: Sample, turns: int) -> dict[str, Any]:
    """The sample's list `accepted`, of what its one answer may hold to be right; nothing where it has none.

    Raises:
        DataError: another thing than a list of texts, or one for a chat of several questions.
    """
    accepted = sample.metadata.get("accepted")
    if accepted is None:
        return {}
    if not (isinstance(accepted, list) and accepted and all(isinstance(text, str) and text.strip() for text in accepted)):
        raise DataError(f"sample {sample.id}: accepted is {str(accepted)[:60]}, expected a list of texts")
    if turns > 2:
        raise DataError(f"sample {sample.id} has accepted answers and {turns // 2} questions, expected one")
    return {"accepted": accepted}


def question_samples(sample: Sample) -> list[tuple[Sample, str, str]]:
    """Each question of a chat by itself, with its answer and its kind ("" where the data name none): pictures of the turns
    before it come first, its own stay where they stand in its text. What was said in between is left out, so that no answer
    gives another away, and so is a last question without an answer."""
    questions = []
    seen: list[dict[str, Any]] = []
    system = [message for message in sample.messages if message["role"] == "system"]
    before = [part["type"] for message in system for part in message["content"]]
    kinds: list[Any] = sample.metadata.get("kinds") or [sample.metadata.get("kind", "")]
    turns = [m for m in sample.messages if m["role"] != "system"]
    for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2])):
        own = list(asked["content"])
        if own and own[0]["type"] == "text":
            own[0] = {"type": "text", "text": ("\n" if seen else "") + own[0]["text"].lstrip("\n")}
        messages = [*system, {"role": "user", "content": [*seen, *own]}]
        answer = "".join(part.get("text", "") for part in answered["content"])
        seen += [part for part in asked["content"] if part["type"] in VISUAL]
        types = [*before, *(part["type"] for part in seen)]
        images, videos = sample.images[: types.count("image")], sample.videos[: types.count("video")]
        question = Sample(f"{sample.id}#{number}", sample.source, messages, images, accepted_by(sample, len(turns)), videos)
        questions.append((question, answer, str(kinds[number % len(kinds)])))
        seen += [part for part in answered["content"] if part["type"] in VISUAL]
    return questions
