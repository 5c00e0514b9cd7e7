"""Answers to the requests of lmms-eval, batch by batch: `generate_until`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from owlfuse.core.errors import DataError, hint
from owlfuse.evaluation.benchmarks.answering import UNLIMITED, LoadedModel
from owlfuse.evaluation.lmms.prompts import Prompt, render_prompt

LONGEST_ANSWER = 1024
"""Tokens, where a task does not say: room for a chain of thought."""
BLANK_LINE = "\n\n"
"""The `until` that lmms-eval writes for every task without one. Its own models leave it out, since
answers to questions that ask for steps have blank lines."""
SAMPLING = ("temperature", "top_p", "top_k")
PASSED = (
    *SAMPLING,
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "length_penalty",
    "min_new_tokens",
)
IGNORED = ("image_aspect_ratio", "skip_special_tokens", "seed", "max_agentic_steps")
"""Keys of generation_kwargs that shipped tasks have for other models, or that mean nothing here."""
GENERATION_KEYS = ("max_new_tokens", "until", "do_sample", "stop_sequences", *PASSED, *IGNORED)


@dataclass(frozen=True)
class Options:
    """How an answer is written.

    Args:
        max_new_tokens: at most so many tokens.
        until: texts of which the first that comes ends the answer, and is no part of it.
        arguments: of transformers' `generate`, by name.
    """

    max_new_tokens: int = LONGEST_ANSWER
    until: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Any], ...] = (("do_sample", False), ("num_beams", 1))

    @classmethod
    def of(cls, generation_kwargs: dict[str, Any], name: str) -> Options:
        """Returns the options of a task's generation_kwargs. Without `do_sample` a temperature
        above 0 asks for sampling; 0 never does.

        Raises:
            DataError: an unknown key, a max_new_tokens below 1, another type.
        """
        if unknown := sorted(set(generation_kwargs) - set(GENERATION_KEYS)):
            guess = hint(unknown[0], GENERATION_KEYS, listed=len(GENERATION_KEYS))
            raise DataError(f"{name}: generation_kwargs: {unknown[0]}: no such key{guess}")
        options = {key: value for key, value in generation_kwargs.items() if value is not None}
        temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
        if not isinstance(temperature, int | float):
            raise DataError(
                f"{name}: generation_kwargs: temperature is {temperature!r}, expected a number"
            )
        sample = bool(options.get("do_sample", True)) and temperature > 0
        arguments: dict[str, Any] = {"num_beams": 1, "do_sample": sample}
        for key in PASSED:
            # transformers warns of sampling options where nothing is sampled
            if key in options and (sample or key not in SAMPLING):
                arguments[key] = options[key]
        if sample:
            arguments["temperature"] = float(temperature)
        tokens = options.get("max_new_tokens", LONGEST_ANSWER)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise DataError(
                f"{name}: generation_kwargs: max_new_tokens is {tokens}, expected a whole number "
                "of at least 1"
            )
        until: list[str] = []
        for key in ("until", "stop_sequences"):
            ends = options.get(key, [])
            ends = [ends] if isinstance(ends, str) else ends
            if not isinstance(ends, list | tuple) or not all(isinstance(end, str) for end in ends):
                raise DataError(
                    f"{name}: generation_kwargs: {key} is {ends!r}, expected a text or a list of "
                    "texts"
                )
            until += [end for end in ends if end != BLANK_LINE]
        # in one order, so that requests with the same options are equal and share a batch
        return cls(tokens, tuple(filter(None, until)), tuple(sorted(arguments.items())))

    @property
    def sampled(self) -> bool:
        """Whether the answer is sampled."""
        return bool(dict(self.arguments)["do_sample"])

    def cut_at_end(self, text: str) -> str:
        """Returns the answer up to the first of `until`, without white space around it."""
        text = text.strip()
        for end in self.until:
            text = text.partition(end)[0]
        return text.strip()


@dataclass
class Request:
    """A prompt that is made when its batch is answered, so that few pictures are open at a time.

    Args:
        name: for messages; with `turn` it is one of its kind, and decides what is sampled.
        size: characters, by which requests are put together.
        turn: the number of the same request before this one.
    """

    name: str
    size: int
    make: Callable[[], Prompt]
    options: Options = field(default_factory=Options)
    turn: int = 0


def batches(requests: list[Request], batch_size: int) -> Iterable[list[int]]:
    """Yields the indices of requests of the same options, the longest first, so that little is
    padded and a memory that is too small shows at once. What is sampled is alone, so that it does
    not depend on the batch."""
    groups: dict[Options, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.options, []).append(index)
    for options, indices in groups.items():
        # the longest first: memory that is too small shows at once
        indices.sort(key=lambda index: -requests[index].size)
        size = 1 if options.sampled else batch_size
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


@dataclass
class Cuts:
    """How many answers were cut where the model has no more positions, and by max_new_tokens."""

    positions: int = 0
    tokens: int = 0

    def describe(self) -> list[str]:
        """Returns a line for each kind that there is."""
        lines = []
        if self.positions:
            lines.append(f"{self.positions} answers were cut where the model has no more positions")
        if self.tokens:
            lines.append(
                f"{self.tokens} answers did not end within the task's max_new_tokens "
                f"({LONGEST_ANSWER} where it has none), and are scored as far as they came"
            )
        return lines


def answer(model: LoadedModel, requests: list[Request], seed: int, cuts: Cuts) -> list[str]:
    """Returns the answers to a batch of requests of the same options, and counts those that were
    cut.

    Raises:
        DataError: a prompt that cannot be made or has no room for an answer.
    """
    options = requests[0].options
    prompts = [request.make() for request in requests]
    texts = [render_prompt(prompt, model.processor, thinking=model.thinking) for prompt in prompts]
    pictures = [prompt.pictures for prompt in prompts]
    inputs = model.processor(images=pictures, text=texts)
    limits = []
    for prompt, used in zip(prompts, inputs["attention_mask"].sum(1).tolist(), strict=True):
        limits.append(min(options.max_new_tokens, free_positions(model, prompt, used)))
    # rows are generated to one length, which may be past the last position of some
    if len(set(limits)) > 1:
        answers = []
        for request in requests:
            answers += answer(model, [request], seed, cuts)
        return answers
    limit = limits[0]
    # the seed of one request is not to change another's, nor lmms-eval's own random state
    with torch.random.fork_rng(enabled=options.sampled):
        if options.sampled:
            torch.manual_seed(seed_of(seed, requests[0]))
        generated = model.generate(inputs, max_new_tokens=limit, **dict(options.arguments))
    rows = generated.tolist()
    answers = []
    for row, text in zip(rows, model.decode(rows), strict=True):
        shortened = options.cut_at_end(text)
        answers.append(shortened)
        # `until` has ended an answer that the model did not.
        if len(row) < limit or shortened != text.strip() or not model.is_cut(row):
            continue
        if limit < options.max_new_tokens:
            cuts.positions += 1
        else:
            cuts.tokens += 1
    return answers


def free_positions(model: LoadedModel, prompt: Prompt, used: int) -> int:
    """Returns how many positions a prompt leaves for its answer. Raises DataError for none."""
    limit = model.max_positions or UNLIMITED
    if used >= limit:
        raise DataError(
            f"{prompt.name}: its prompt takes {used} positions, and the model has {limit}"
        )
    return limit - used


def seed_of(seed: int, request: Request) -> int:
    """Returns the seed of a request's own random numbers, which do not depend on the requests
    before it."""
    words = f"{seed} {request.name} {request.turn}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "little")
