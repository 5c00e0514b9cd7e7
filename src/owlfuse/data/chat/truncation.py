"""What becomes of a chat that is longer than it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from owlfuse.core.errors import DataError
from owlfuse.core.types import Encoded, Sample

OnLength = Literal["error", "skip", "truncate_turns"]
"""`error`: a longer chat is a wrong sample, as its source's `on_error` has it; `skip`: it is left
out and counted among the skips; `truncate_turns`: it is cut to the first questions with their
answers that fit, the images of the others with them."""


def policy_of(on_length: OnLength | dict[str, OnLength], source: str) -> OnLength:
    """A source's policy; sources that a mapping does not name have `error`."""
    return on_length.get(source, "error") if isinstance(on_length, dict) else on_length


def check_policies(on_length: OnLength | dict[str, OnLength], sources: list[str]) -> None:
    """Raises DataError for a policy that there is not, and for one of a source that there is
    not."""
    policies = on_length if isinstance(on_length, dict) else {"": on_length}
    for name, policy in policies.items():
        if name and name not in sources:
            raise DataError(
                f"on_length: there is no source {name}, expected one of {', '.join(sources)}"
            )
        if policy not in ("error", "skip", "truncate_turns"):
            raise DataError(f"on_length: {policy}, expected error, skip or truncate_turns")


def over_length(sample: Sample, length: int, max_length: int, policy: OnLength) -> DataError:
    """The error of a chat that is too long; with the policy `skip` it says of itself that it is
    to be left out."""
    error = DataError(
        f"sample {sample.id} is {length} tokens long, over max_length of {max_length}"
    )
    error.leave_out = policy == "skip"
    return error


def answers_of(sample: Sample) -> list[int]:
    """The turns that end what is said to a question; a call of a tool does not."""
    roles = [message["role"] for message in sample.messages] + ["user"]
    return [
        turn
        for turn, role in enumerate(roles[:-1])
        if role == "assistant" and roles[turn + 1] != "tool"
    ]


def first_turns(sample: Sample, questions: int) -> Sample:
    """The chat up to the answer of its `questions`-th question, with the images of what is left."""
    messages = sample.messages[: answers_of(sample)[questions - 1] + 1]
    kinds = [part["type"] for message in messages for part in message["content"]]
    images, videos = sample.images[: kinds.count("image")], sample.videos[: kinds.count("video")]
    return replace(sample, messages=messages, images=images, videos=videos)


def truncate(encode: Callable[[Sample], Encoded], sample: Sample, max_length: int) -> Encoded:
    """As many of the first questions with their answers as fit, encoded; it counts the turns that
    it lacks.

    Args:
        encode: a sample of any length -> `Encoded`.

    Raises:
        DataError: not even the first question with its answer fits.
    """
    turns = len(answers_of(sample))
    fits, low, high = None, 1, turns
    while low <= high:
        middle = (low + high) // 2
        encoded = encode(first_turns(sample, middle))
        if len(encoded.input_ids) <= max_length:
            fits, low = encoded, middle + 1
        else:
            shortest, high = len(encoded.input_ids), middle - 1
    if fits is None:
        raise DataError(
            f"sample {sample.id} is {shortest} tokens long with its first turn alone, over "
            f"max_length of {max_length}"
        )
    fits.turns_removed = turns - (low - 1)
    return fits
