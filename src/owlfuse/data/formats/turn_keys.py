"""What a turn holds beside its text: its role, tool calls, a thought, and whether its answer is
learned from."""

from __future__ import annotations

import json
from typing import Any

from owlfuse.core.errors import DataError

ROLES = {
    **dict.fromkeys(("system", "developer", "system_prompt", "system_message"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"
    ),
}
"""The names of the four roles in the data of others."""

CALL_ROLES = ("function_call", "tool_call", "tool_calls")
"""Roles of turns whose text is an assistant's tool call, or a list of them, in JSON (ShareGPT's
heirs)."""

LEARN_KEYS = (
    *(
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
    ),
    *(
        "train_on",
        "train_on_turn",
        "train_on_this",
        "learnable",
        "is_trainable",
        "use_loss",
        "has_loss",
        "calculate_loss",
    ),
    *(
        "weight",
        "weights",
        "loss_weight",
        "loss_weights",
        "loss_scale",
        "train_weight",
        "token_weight",
    ),
)
"""Of a turn: 1 or true where its answer is learned from, 0 or false where it is not."""

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
"""Of a turn: true where its answer is not learned from."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")

REFUSED_KEYS = {
    "mask": (
        "which some read as 'not learned from' and others as 'learned from'; write loss: true "
        "or false"
    ),
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
    "audio": "sound, which no model here hears",
    "audios": "sound, which no model here hears",
    "documents": "documents, which no chat template here is given; write them into the text",
    "attachments": "attachments, which are not read; write them into the text",
    "rejected": "an answer that is not to be given; preference pairs are not read",
    "chosen": "one of a preference pair; preference pairs are not read",
}
"""Keys of a turn that would change what is learned if they were left out, and what they are."""


def is_absent(value: Any) -> bool:
    """Whether a key's value says nothing:

    `datasets` fills the keys that a row does not have with None.
    """
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def check_refused(node: dict[str, Any], refused: dict[str, str], name: str, what: str) -> None:
    """Raises DataError for a key of a turn or a record that cannot be honored and changes what
    is learned."""
    for key in node.keys() & refused.keys():
        if not is_absent(node[key]):
            raise DataError(
                f"sample {name}: {what} has '{key}': {brief(node[key])}, {refused[key]}"
            )


def one_of(
    node: dict[str, Any], keys: tuple[str, ...], name: str, what: str
) -> tuple[str | None, Any]:
    """The key of `keys` that a turn or a record has, and its value.

    Raises DataError where several are there and differ.
    """
    if node.keys().isdisjoint(keys):
        return None, None
    there = [key for key in keys if key in node and not is_absent(node[key])]
    if not there:
        return None, None
    first = there[0]
    for key in there[1:]:
        if node[key] != node[first]:
            raise DataError(
                f"sample {name}: {what} has '{first}' and '{key}', expected one of them"
            )
    return first, node[first]


def is_supervised(turn: dict[str, Any], role: str, name: str) -> bool:
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
                "or false: an answer is "
                "learned from or not, it has no weight"
            )
        verdicts[key] = bool(value) != (key in NOT_LEARN_KEYS)
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


def extras_of(turn: dict[str, Any], role: str, name: str) -> dict[str, Any]:
    """The keys of a `Sample`'s message beside `role` and `content`. Raises DataError."""
    check_refused(turn, REFUSED_KEYS, name, "a turn")
    extras: dict[str, Any] = {}
    thought_key, thought = one_of(turn, THOUGHT_KEYS, name, "a turn")
    if thought_key is not None:
        if not isinstance(thought, str) or role != "assistant":
            raise DataError(
                f"sample {name}: '{thought_key}' in a turn of the {role} is {brief(thought)}, "
                "expected an answer's text"
            )
        extras["reasoning_content"] = thought
    calls_key, calls = one_of(turn, ("tool_calls", "function_call"), name, "a turn")
    if calls_key is not None:
        if role != "assistant":
            raise DataError(
                f"sample {name}: a turn of the {role} has '{calls_key}', which only the "
                "assistant's may have"
            )
        extras["tool_calls"] = tool_calls_of(calls, name)
    for key in ("tool_call_id", "name"):
        value = turn.get(key)
        if is_absent(value):
            continue
        if not isinstance(value, str):
            raise DataError(f"sample {name}: '{key}' of a turn is {brief(value)}, expected a text")
        extras[key] = value
    if not is_supervised(turn, role, name):
        extras["supervised"] = False
    return extras


def tool_calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them, `{"type": "function", "function": {"name",
    "arguments": {...}}}`, from a list, one call, or a JSON text of either; `arguments` too may be a
    JSON text. Raises DataError."""
    value = from_json(value, name, "a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = from_json(call, name, "a tool call")
        function = (
            call.get("function")
            if isinstance(call, dict) and isinstance(call.get("function"), dict)
            else call
        )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"sample {name}: a tool call is {brief(call)}, expected a name and arguments"
            )
        arguments: Any = next(
            (function[key] for key in ("arguments", "parameters") if function.get(key) is not None),
            {},
        )
        arguments = (
            from_json(arguments, name, "the arguments of a tool call") if arguments != "" else {}
        )
        if not isinstance(arguments, dict):
            raise DataError(
                f"sample {name}: the arguments of a tool call are {brief(arguments)}, expected an "
                "object"
            )
        read: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        if isinstance(call.get("id"), str):
            read["id"] = call["id"]
        calls.append(read)
    return calls


def tools_of(record: dict[str, Any], name: str) -> list[Any] | None:
    """A record's `tools` or `functions`, a list or its JSON text, as chat templates take them.

    Raises DataError.
    """
    key, value = one_of(record, ("tools", "functions"), name, "the record")
    if key is None:
        return None
    tools = from_json(value, name, f"'{key}'")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise DataError(f"sample {name}: '{key}' is {brief(value)}, expected a list of tools")
    read = []
    for tool in tools:
        tool = from_json(tool, name, "a tool")
        if not isinstance(tool, dict):
            raise DataError(
                f"sample {name}: a tool is {brief(tool)}, expected an object with its name"
            )
        if "function" not in tool and "type" not in tool:
            tool = {"type": "function", "function": tool}
        read.append(tool)
    return read or None


def from_json(value: Any, name: str, what: str) -> Any:
    """What a JSON text holds; other values as they are. Raises DataError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"sample {name}: {what} is {brief(value)}, expected JSON") from None


def brief(value: Any) -> str:
    """The beginning of what was found, on one line."""
    return " ".join(str(value)[:80].split())
