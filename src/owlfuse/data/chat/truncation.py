"""The policies for a chat that is longer than `max_length`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from owlfuse.core.errors import DataError
from owlfuse.core.types import Encoded, Sample

# `error`: a longer chat is a wrong sample, for which its source has `on_error`; `skip`: it is left
# out and counted among the skips; `truncate_turns`: it is cut to the first questions with their
# answers that fit, and the images of the others are dropped.
OnLength = Literal["error", "skip", "truncate_turns"]


def policy_of(on_length: OnLength | dict[str, OnLength], source: str) -> OnLength:
    """Return a source's policy; sources that a mapping does not name have `error`."""
    return on_length.get(source, "error") if isinstance(on_length, dict) else on_length


def check_policies(on_length: OnLength | dict[str, OnLength], sources: list[str]) -> None:
    """Raise DataError for an unknown policy, and for a policy of an unknown source."""
    policies = on_length if isinstance(on_length, dict) else {"": on_length}
    for name, policy in policies.items():
        if name and name not in sources:
            raise DataError(
                f"on_length: there is no source {name}, expected one of {', '.join(sources)}"
            )
        if policy not in ("error", "skip", "truncate_turns"):
            raise DataError(f"on_length: {policy}, expected error, skip or truncate_turns")


def over_length(
    sample: Sample,
    length: int,
    max_length: int,
    policy: OnLength,
) -> DataError:
    """Return the error of a chat that is too long; with the policy `skip` its `leave_out` is
    True."""
    error = DataError(
        f"sample {sample.id} is {length} tokens long, over max_length of {max_length}"
    )
    # An attribute, since the data loader decides on it and not on the message.
    error.leave_out = policy == "skip"
    return error


def answer_turns(sample: Sample) -> list[int]:
    """Return the turns that end the answer to a question; a call of a tool does not."""
    roles = [message["role"] for message in sample.messages] + ["user"]
    turns = []
    for turn, role in enumerate(roles[:-1]):
        if role == "assistant" and roles[turn + 1] != "tool":
            turns.append(turn)
    return turns


def first_turns(sample: Sample, questions: int) -> Sample:
    """Return the chat up to the answer of its `questions`-th question, with the images up to
    there."""
    messages = sample.messages[: answer_turns(sample)[questions - 1] + 1]
    kinds = [part["type"] for message in messages for part in message["content"]]
    images, videos = sample.images[: kinds.count("image")], sample.videos[: kinds.count("video")]
    return replace(sample, messages=messages, images=images, videos=videos)


def first_learned(sample: Sample) -> int:
    """Return the number of the first question, from 1, of whose answer something is learned; one
    more than there are where it is none's."""
    ends = answer_turns(sample)
    for turn, message in enumerate(sample.messages):
        if message["role"] == "assistant" and message.get("supervised", True):
            return 1 + sum(end < turn for end in ends)
    return 1 + len(ends)


def truncate(encode: Callable[[Sample], Encoded], sample: Sample, max_length: int) -> Encoded:
    """Return as many of the first questions with their answers as fit, encoded, with the number of
    turns that are missing.

    Args:
        encode: encodes a sample of any length.

    Raises:
        DataError: not even the turns up to the first answer that is learned fit.
    """
    turns = len(answer_turns(sample))
    # Fewer would be refused: nothing of them is learned.
    first = first_learned(sample)
    if first > turns:  # what is learned is a call of a tool, behind which no question ends
        raise over_length(sample, len(encode(sample).input_ids), max_length, "truncate_turns")
    # Bisection: each try renders and encodes the chat again.
    longest, low, high = None, first, turns
    while low <= high:
        middle = (low + high) // 2
        encoded = encode(first_turns(sample, middle))
        length = len(encoded.input_ids)
        if length <= max_length:
            longest, low = encoded, middle + 1
        else:
            shortest, high = length, middle - 1
    if longest is None:
        part = "first turn alone" if first == 1 else f"first {first} turns, the last alone learned"
        raise DataError(
            f"sample {sample.id} is {shortest} tokens long with its {part}, over max_length of "
            f"{max_length}"
        )
    # A question without an answer at the end is no turn, and is left out before all others.
    longest.turns_removed = max(1, turns - (low - 1))
    return longest
