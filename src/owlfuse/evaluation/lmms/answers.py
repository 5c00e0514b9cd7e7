"""Answers to the requests of lmms-eval, batch by batch: `generate_until`."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from owlfuse.core.errors import DataError
from owlfuse.evaluation.benchmarks.answering import Talker, generated
from owlfuse.evaluation.lmms.prompts import Prompt, written

LONGEST_ANSWER = 256
"""Tokens, where a task does not say."""
SAMPLING = ("temperature", "top_p", "top_k")
PASSED = (
    *SAMPLING,
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "length_penalty",
    "min_new_tokens",
)
ASIDE = ("image_aspect_ratio", "skip_special_tokens", "seed", "max_agentic_steps")
"""Keys of generation_kwargs that shipped tasks have for other models, or that mean nothing here."""
KNOWN = ("max_new_tokens", "until", "do_sample", "stop_sequences", *PASSED, *ASIDE)


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
    def of(cls, given: dict[str, Any], name: str) -> Options:
        """Of a task's generation_kwargs. Without `do_sample` a temperature above 0 asks for
        sampling; 0 never does.

        Raises:
            DataError: an unknown key, or a max_new_tokens below 1.
        """
        if unknown := sorted(set(given) - set(KNOWN)):
            match = difflib.get_close_matches(unknown[0], KNOWN, n=1)
            guess = f"did you mean '{match[0]}'?" if match else f"the keys are {', '.join(KNOWN)}"
            raise DataError(f"{name}: generation_kwargs: {unknown[0]}: no such key; {guess}")
        given = {key: value for key, value in given.items() if value is not None}
        temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        sample = bool(given.get("do_sample", True)) and temperature > 0
        arguments = {"num_beams": 1} | {
            key: given[key] for key in PASSED if key in given and (sample or key not in SAMPLING)
        }
        arguments |= {"do_sample": sample} | ({"temperature": temperature} if sample else {})
        tokens = given.get("max_new_tokens", LONGEST_ANSWER)
        if not isinstance(tokens, int) or tokens < 1:
            raise DataError(
                f"{name}: generation_kwargs: max_new_tokens is {tokens}, expected a whole number "
                "of at least 1"
            )
        ends = [given[key] for key in ("until", "stop_sequences") if key in given]
        until = [end for one in ends for end in ([one] if isinstance(one, str) else one) if end]
        return cls(tokens, tuple(until), tuple(sorted(arguments.items())))

    @property
    def sampled(self) -> bool:
        """Whether chance decides."""
        return bool(dict(self.arguments)["do_sample"])

    def ended(self, text: str) -> str:
        """The answer up to the first of `until`, without white space around it."""
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
    """Places of requests of the same options, the longest first, so that little is padded and a
    memory that is too small shows at once. What is sampled is alone, so that it does not depend on
    the batch."""
    groups: dict[Options, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.options, []).append(place)
    for options, places in groups.items():
        places.sort(key=lambda place: -requests[place].size)
        size = 1 if options.sampled else batch_size
        yield from (places[start : start + size] for start in range(0, len(places), size))


def answer(talker: Talker, requests: list[Request], seed: int) -> tuple[list[str], int]:
    """The answers to a batch of requests of the same options, and how many of them ended where the
    model has no more positions.

    Raises:
        DataError: a prompt that cannot be made or has no room for an answer.
    """
    options = requests[0].options
    prompts = [request.make() for request in requests]
    texts = [written(prompt, talker.processor, thinking=talker.thinking) for prompt in prompts]
    inputs = talker.processor(
        images=[picture for prompt in prompts for picture in prompt.pictures], text=texts
    )
    rooms = [
        room(talker, prompt, int(used))
        for prompt, used in zip(prompts, inputs["attention_mask"].sum(1), strict=True)
    ]
    limits = [min(options.max_new_tokens, left) for left in rooms]
    with torch.random.fork_rng(enabled=options.sampled):
        if options.sampled:
            torch.manual_seed(seed_of(seed, requests[0]))
        new = generated(talker, inputs, max_new_tokens=max(limits), **dict(options.arguments))
    ends = talker.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    rows = [row[:limit].tolist() for row, limit in zip(new, limits, strict=True)]
    cut = [
        limit < options.max_new_tokens and len(row) == limit and not ends & set(row)
        for row, limit in zip(rows, limits, strict=True)
    ]
    return [options.ended(text) for text in talker.answers(rows)], sum(cut)


def room(talker: Talker, prompt: Prompt, used: int) -> int:
    """The positions that a prompt leaves for its answer. Raises DataError where there is none."""
    longest = talker.longest or 2**31
    if used >= longest:
        raise DataError(
            f"{prompt.name}: its prompt takes {used} positions, and the model has {longest}"
        )
    return longest - used


def seed_of(seed: int, request: Request) -> int:
    """Of a request's own random numbers, which do not depend on the requests before it."""
    words = f"{seed} {request.name} {request.turn}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "little")
