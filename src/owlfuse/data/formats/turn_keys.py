"""The keys of a turn beside its text: its role, tool calls, a thought, and whether its answer is
learned from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import JsonObject

# The names of the four roles in the data of others.
ROLES = {
    **dict.fromkeys(("system", "developer", "system_prompt", "system_message"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"
    ),
}

# Roles of turns whose text is an assistant's tool call, or a list of them, in JSON (ShareGPT's
# heirs).
CALL_ROLES = ("function_call", "tool_call", "tool_calls")

# Keys of a turn that are 1 or true where its answer is learned from, and 0 or false where not.
LEARN_KEYS = (
    "loss",
    "train",
    "training",
    "trainable",
    "trained",
    "learn",
    "supervise",
    "supervised",
    "compute_loss",
    "loss_mask",
    "train_on",
    "train_on_turn",
    "train_on_this",
    "learnable",
    "is_trainable",
    "use_loss",
    "has_loss",
    "calculate_loss",
    "weight",
    "weights",
    "loss_weight",
    "loss_weights",
    "loss_scale",
    "train_weight",
    "token_weight",
)

# Keys of a turn that are true where its answer is not learned from.
NOT_LEARN_KEYS = (
    "masked",
    "ignore",
    "ignored",
    "ignore_loss",
    "skip_loss",
    "no_loss",
    "is_masked",
    "exclude",
    "excluded",
)

# Keys of the pictures and the videos of a turn or a record.
IMAGES = ("image", "images")
VIDEOS = ("video", "videos")

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")

# Keys beside a question that belong to it and are not part of its text: the answers to choose from,
# and what the question is about.
QUESTION_REFUSED = (
    *("choices", "options", "candidates", "choice_list", "answer_choices"),
    *(f"{kind}_{letter}" for kind in ("choice", "option") for letter in "abcdeABCDE"),
    *"ABCDE",
    *(f"a{number}" for number in range(5)),
    *("context", "passage", "hint", "document", "article", "story", "paragraph", "paragraphs"),
)

# Keys of which false says as much as true.
VERDICTS = ("kto_tag", "mask")

# Keys of a turn or a record that would change what is learned if they were left out, and what they
# are.
REFUSED = {
    "mask": (
        "which some read as 'not learned from' and others as 'learned from'; write loss: true "
        "or false"
    ),
    "audio": "sound, which no model here hears",
    "audios": "sound, which no model here hears",
    "documents": "documents, which no chat template here is given; write them into the text",
    "attachments": "attachments, which are not read; write them into the text",
    "rejected": "an answer that is not to be given; preference pairs are not read",
    "chosen": "one of a preference pair; preference pairs are not read",
}
# Those of a turn.
REFUSED_KEYS = {
    **REFUSED,
    "prefix": (
        "the beginning of an answer to go on with, which is no answer to learn; leave the turn out"
    ),
    "train_detail": (
        "which parts of an answer are learned from; an answer is learned from whole or not at all"
    ),
    "training_detail": (
        "which parts of an answer are learned from; an answer is learned from whole or not at all"
    ),
    "refusal": "a refusal beside the content; write it as the content",
}


def is_absent(value: Any) -> bool:
    """Whether a key's value says nothing: `datasets` fills the keys that a row does not have with
    None."""
    if value is None or value is False:
        return True
    return isinstance(value, str | list | dict) and not value


def present_keys(node: JsonObject, keys: Iterable[str]) -> list[str]:
    """Return those of some keys whose values say something, in the order of `keys`."""
    return [key for key in keys if not is_absent(node.get(key))]


def check_refused(node: JsonObject, refused: dict[str, str], name: str, owner: str) -> None:
    """Raise DataError for a key of a turn or a record that cannot be honored and changes what is
    learned.

    Args:
        owner: `a turn` or `the record`, for the message.
    """
    for key, reason in refused.items():
        is_verdict = key in VERDICTS and node.get(key) is False
        if is_verdict or not is_absent(node.get(key)):
            raise DataError(f"sample {name}: {owner} has '{key}': {brief(node[key])}, {reason}")


def single_value(
    node: JsonObject,
    keys: tuple[str, ...],
    name: str,
    owner: str,
) -> tuple[str | None, Any]:
    """Return the first of `keys` that a turn or a record has, and its value; None where it has
    none.

    Raises DataError where several are present and differ.
    """
    if node.keys().isdisjoint(keys):  # most turns of most data
        return None, None
    present = present_keys(node, keys)
    if not present:
        return None, None
    first = present[0]
    for key in present[1:]:
        if node[key] != node[first]:
            raise DataError(
                f"sample {name}: {owner} has '{first}' and '{key}', expected one of them"
            )
    return first, node[first]


def is_supervised(turn: JsonObject, role: str, name: str) -> bool:
    """Whether a turn's answer is learned from, by any of LEARN_KEYS and NOT_LEARN_KEYS.

    Raises:
        DataError: a weight between 0 and 1, keys that contradict each other, or a turn that is to
            be learned from and is not the assistant's.
    """
    verdicts: dict[str, bool] = {}
    for key in turn.keys() & {*LEARN_KEYS, *NOT_LEARN_KEYS}:
        value = turn[key]
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"sample {name}: a turn has '{key}': {brief(repr(value))}, expected 1 or true, 0 "
                "or false: an answer is learned from or not, it has no weight"
            )
        # Nothing else than an answer is learned, so that false of `ignore` says nothing there.
        if role != "assistant" and key in NOT_LEARN_KEYS and not value:
            continue
        # The two lists of keys have opposite meanings.
        verdicts[key] = bool(value) != (key in NOT_LEARN_KEYS)
    # Which of two contradicting keys was meant cannot be known.
    if len(set(verdicts.values())) > 1:
        keys = " and ".join(f"'{key}': {brief(turn[key])}" for key in sorted(verdicts))
        raise DataError(f"sample {name}: a turn has {keys}, which contradict each other")
    if role == "assistant":
        return all(verdicts.values())
    if any(verdicts.values()):
        key = min(verdicts)
        raise DataError(
            f"sample {name}: a turn of the {role} has '{key}': {brief(turn[key])}, and only what "
            "the assistant says is learned"
        )
    return True


def extras_of(turn: JsonObject, role: str, name: str) -> JsonObject:
    """Return the keys of a `Sample`'s message beside `role` and `content`. Raises DataError."""
    check_refused(turn, REFUSED_KEYS, name, "a turn")
    extras: JsonObject = {}
    key, thought = single_value(turn, THOUGHT_KEYS, name, "a turn")
    if key is not None:
        if not isinstance(thought, str) or role != "assistant":
            raise DataError(
                f"sample {name}: '{key}' in a turn of the {role} is {brief(thought)}, expected an "
                "answer's text"
            )
        extras["reasoning_content"] = thought
    key, calls = single_value(turn, ("tool_calls", "function_call"), name, "a turn")
    if key is not None:
        if role != "assistant":
            raise DataError(
                f"sample {name}: a turn of the {role} has '{key}', which only the assistant's may "
                "have"
            )
        extras["tool_calls"] = tool_calls_of(calls, name)
    for text_key in ("tool_call_id", "name"):
        value = turn.get(text_key)
        if is_absent(value):
            continue
        if not isinstance(value, str):
            raise DataError(
                f"sample {name}: '{text_key}' of a turn is {brief(value)}, expected a text"
            )
        extras[text_key] = value
    # Absent means supervised, so that usual messages have no further key.
    if not is_supervised(turn, role, name):
        extras["supervised"] = False
    return extras


def tool_calls_of(value: Any, name: str) -> list[JsonObject]:
    """Return tool calls as chat templates take them, `{"type": "function", "function": {"name",
    "arguments": {...}}}`, from a list, one call, or a JSON text of either.

    Raises DataError.
    """
    value = from_json(value, name, "a tool call")
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        call = from_json(entry, name, "a tool call")
        function = call
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"sample {name}: a tool call is {brief(call)}, expected a name and arguments"
            )
        arguments = function.get("arguments")
        # Llama's data and templates call them parameters.
        if arguments is None:
            arguments = function.get("parameters")
        if arguments is None or arguments == "":
            arguments = {}
        arguments = from_json(arguments, name, "the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise DataError(
                f"sample {name}: the arguments of a tool call are {brief(arguments)}, expected an "
                "object"
            )
        calls.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
        if isinstance(call.get("id"), str):
            calls[-1]["id"] = call["id"]
    return calls


def tools_of(record: JsonObject, name: str) -> list[Any] | None:
    """Return a record's `tools` or `functions`, a list or its JSON text, as chat templates take
    them.

    Raises DataError.
    """
    key, value = single_value(record, ("tools", "functions"), name, "the record")
    if key is None:
        return None
    entries = from_json(value, name, f"'{key}'")
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list):
        raise DataError(f"sample {name}: '{key}' is {brief(value)}, expected a list of tools")
    tools = []
    for entry in entries:
        tool = from_json(entry, name, "a tool")
        if not isinstance(tool, dict):
            raise DataError(
                f"sample {name}: a tool is {brief(tool)}, expected an object with its name"
            )
        # Some data list bare functions, and templates expect the wrapped form of OpenAI.
        if "function" not in tool and "type" not in tool:
            tool = {"type": "function", "function": tool}
        tools.append(tool)
    return tools or None


def from_json(value: Any, name: str, subject: str) -> Any:
    """Return the value of a JSON text; other values as they are. Raises DataError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"sample {name}: {subject} is {brief(value)}, expected JSON") from None


def brief(value: Any) -> str:
    """Return the beginning of a value, on one line, for a message."""
    # Cut before the split: a value may have megabytes.
    return " ".join(str(value)[:80].split())
