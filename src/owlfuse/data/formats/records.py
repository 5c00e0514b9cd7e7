"""A record with a chat -> a `Sample`, whatever the names that its turns, system text, tools and
pictures have."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import Note, Sample
from owlfuse.data.formats.turn_keys import (
    LEARN_KEYS,
    NOT_LEARN_KEYS,
    REFUSED_KEYS,
    SYSTEM_KEYS,
    brief,
    check_refused,
    from_json,
    is_absent,
    one_of,
    tools_of,
)
from owlfuse.data.formats.turns import EXPECTED_TURN, chat, pictures_of, videos_of

CHATS = ("messages", "conversations", "conversation", "texts")
"""Where a record has its turns: a list, its JSON text, or a dict of lists of the same length."""

QUESTIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "response"),
)
"""Where a record has a question and its answer instead: texts, lists of turns (trl), or a list
of answers (VQA)."""

QUESTION_KEYS = tuple(dict.fromkeys(key for pair in QUESTIONS for key in pair))

IMAGES = ("image", "images")
VIDEOS = ("video", "videos")
TOOLS = ("tools", "functions")
METADATA = ("kind", "kinds", "accepted")
"""What a validation source's questions are told apart and judged by (see `evaluation`)."""

WEIGHTS = ("sample_weight", "label", *LEARN_KEYS)
"""Of a whole record, which is learned from like every other: another value than 1 or true is
refused."""
RECORD_REFUSED = {
    "instruction": "a text beside the chat; write it as 'system', or into the question",
    "instructions": "a text beside the chat; write it as 'system', or into the question",
    "chat_template_kwargs": "options of a chat template; they are one for all samples",
    "rejected_response": "an answer that is not to be given; preference pairs are not read",
    "rejected_messages": "an answer that is not to be given; preference pairs are not read",
    "kto_tag": "a judgement of the answer; preference data are not read",
    **{
        key: REFUSED_KEYS[key]
        for key in ("mask", "audio", "audios", "documents", "attachments", "rejected", "chosen")
    },
}
"""Keys of a record that would change what is learned if they were left out, and what they are."""

QUESTION_REFUSED = ("choices", "options", "context", "passage", "hint")
"""Beside a question, what belongs to it and is not part of its text."""

KNOWN = frozenset(
    (
        *(
            *CHATS,
            *QUESTION_KEYS,
            *SYSTEM_KEYS,
            *IMAGES,
            *VIDEOS,
            *TOOLS,
            *METADATA,
            *WEIGHTS,
            *NOT_LEARN_KEYS,
        ),
        *(*RECORD_REFUSED, *QUESTION_REFUSED, "history", "id"),
    )
)
"""All keys of a record that are read somewhere; of a table, the columns that are read."""

LOOKS_LIKE_FILE = re.compile(
    r"(?P<kind>image|img|picture|photo|video|clip|audio|sound|speech)s?"
    r"(?P<number>_?\d+)?(?:_(?:paths?|files?|urls?|bytes|list|names?))?"
)
"""Names of keys that hold a picture, a video or sound, but those of IMAGES and VIDEOS."""


def read_chat(
    record: dict[str, Any],
    name: str,
    source: str,
    chat_key: str,
    images: list[str | bytes] | None = None,
    videos: list[str | bytes] | None = None,
) -> Sample:
    """A record with a chat, or with a question and its answer, as a sample called `name`.

    Args:
        chat_key: where the format has its turns; another of CHATS is read too.
        images, videos: by default those of the record.

    Raises:
        DataError: a record that is no chat, that has two, or that has what would change its meaning
            if it were left out.
    """
    check_refused(record, RECORD_REFUSED, name, "the record")
    turns, used, more = find_turns(record, name, chat_key)
    turns = [*system_turn(record, name, turns), *turns]
    pictures = pictures_of(record, name) if images is None else images
    clips = videos_of(record, name) if videos is None else videos
    read = chat(turns, pictures, name, clips)
    metadata = {
        key: value for key, value in record.items() if key not in used and key not in NOT_METADATA
    } | more
    notes = [*read.notes, *check_rest(record, name, metadata.keys() - more.keys())]
    if "answers" in more:
        metadata["accepted"] = record.get("accepted") or more["answers"]
        del metadata["answers"]
        notes.append(
            Note(
                "assumed",
                "of several answers the most frequent is learned, and all are right in evaluation",
            )
        )
    return Sample(
        name,
        source,
        read.messages,
        read.images,
        metadata,
        read.videos,
        tools_of(record, name),
        notes,
    )


NOT_METADATA = frozenset(("id", *SYSTEM_KEYS, *IMAGES, *VIDEOS, *TOOLS))


def has_chat(record: dict[str, Any]) -> bool:
    """Whether a record has turns, a question with an answer, or a conversation in one text."""
    there = {key for key, value in record.items() if not is_absent(value)}
    return (
        bool(there & {*CHATS})
        or any(there.issuperset(pair) for pair in QUESTIONS)
        or is_conversation(record.get(TEXT))
    )


def find_turns(
    record: dict[str, Any], name: str, chat_key: str
) -> tuple[list[Any], set[str], dict[str, Any]]:
    """A record's turns, the keys that they are under, and what of them is metadata.

    Raises DataError.
    """
    chats = [key for key in CHATS if key in record and not is_absent(record[key])]
    if len(chats) > 1:
        raise DataError(f"sample {name} has '{chats[0]}' and '{chats[1]}', expected one chat")
    if chats:
        return turns_of(record[chats[0]], name, chats[0]), {chats[0]}, {}
    for question, answer in QUESTIONS:
        if all(key in record and not is_absent(record[key]) for key in (question, answer)):
            return question_turns(record, name, question, answer)
    for question, answer in QUESTIONS:
        if question in record and answer in record:
            return question_turns(record, name, question, answer)
    if chat_key in record:
        return turns_of(record[chat_key], name, chat_key), {chat_key}, {}
    if is_conversation(record.get(TEXT)):
        return text_turns(record[TEXT]), {TEXT}, {}
    there = ", ".join(sorted(record)) or "nothing"
    raise DataError(f"sample {name} has no '{chat_key}'; it has {there}; {EXPECTED}")


TEXT = "text"
"""Where mPLUG-Owl1's data have a whole conversation as one text, `Human: ...` and `AI: ...` a
line each."""
OPENING = (
    "The following is a conversation between a curious human and AI assistant. The assistant "
    "gives helpful, detailed, and "
    "polite answers to the user's questions."
)
"""Begins each of these texts. The chat template that belongs to them writes it."""
SPEAKERS = re.compile(r"(?:\A|\n)[ \t]*(Human|AI):")
SPEAKERS_IN_LINE = re.compile(r"(?:\A|\s)(Human|AI):(?=\s|\Z)")
"""Where a text has no line breaks."""


def is_conversation(text: Any) -> bool:
    """Whether a text is a conversation as mPLUG-Owl1's data have it."""
    return isinstance(text, str) and {speaker for speaker, _ in said(text)[1]} == {"Human", "AI"}


def said(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first speaker, and each speaker with what it says."""
    opening, *pieces = (SPEAKERS if "\n" in text.strip() else SPEAKERS_IN_LINE).split(text)
    return opening.strip(), [
        (speaker, words.strip()) for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def text_turns(text: str) -> list[dict[str, str]]:
    """The turns of a conversation in one text. What a speaker says in several lines of its own is
    one turn, as a picture and the question about it; another opening than the usual one is a system
    text."""
    opening, speakers = said(text)
    turns: list[dict[str, str]] = []
    if opening and opening != OPENING:
        turns.append({"role": "system", "content": opening})
    for speaker, words in speakers:
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role == "user":
            turns[-1]["content"] += f"\n{words}"
        else:
            turns.append({"role": role, "content": words})
    return turns


EXPECTED = (
    f"expected a chat in {', '.join(CHATS)}, or "
    f"{', '.join(' and '.join(pair) for pair in QUESTIONS[:4])}"
)


def turns_of(value: Any, name: str, key: str) -> list[Any]:
    """A list of turns, from a list, its JSON text, or a dict of lists, as `datasets` stores a
    Sequence of dicts."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(
                f"sample {name}: '{key}' is a str, expected list or its JSON text"
            ) from None
    if isinstance(value, dict):
        lists = [column for column in value.values() if isinstance(column, list)]
        if len(lists) == len(value) and len({len(column) for column in lists}) == 1:
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]
    if not isinstance(value, list):
        raise DataError(f"sample {name}: '{key}' is a {type(value).__name__}, expected list")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise DataError(
                f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN} (turn {number})"
            )
    return value


def question_turns(
    record: dict[str, Any], name: str, question_key: str, answer_key: str
) -> tuple[list[Any], set[str], dict[str, Any]]:
    """Turns of a record with a question and its answer, `history` before them; see `find_turns`."""
    for key in QUESTION_REFUSED:
        if not is_absent(record.get(key)):
            raise DataError(
                f"sample {name} has '{key}' beside '{question_key}': write it into the question, "
                "it would be left out"
            )
    question, answer = record[question_key], record[answer_key]
    used, more = {question_key, answer_key, "history"}, {}
    answers = (
        record.get("answers")
        if answer_key == "answer" and not is_absent(record.get("answers"))
        else None
    )
    if answers is not None:
        used.add("answers")
    if isinstance(answer, list) and question_key != "prompt":
        answers, answer = answer, most_frequent(answer, name, answer_key)
    if answers is not None:
        different = list(
            dict.fromkeys([answer, *(text_of(each, name, "answers") for each in answers)])
        )
        more = {"answers": different} if len(different) > 1 else {}
    asked = question if isinstance(question, list) else [{"role": "user", "content": question}]
    answered = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    if not isinstance(question, str | list) or not isinstance(answer, str | list):
        raise DataError(
            f"sample {name}: {question_key} is {brief(question)}, {answer_key} {brief(answer)}, "
            "expected texts"
        )
    # trl learns from the completion alone: what the assistant says in the prompt is given
    asked = [given(turn) if isinstance(turn, dict) else turn for turn in asked]
    return [*history_turns(record.get("history"), name), *asked, *answered], used, more


def given(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of a prompt, of which nothing is learned."""
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    return {**turn, "loss": False} if role in ("assistant", "gpt") else turn


def history_turns(history: Any, name: str) -> list[Any]:
    """Turns before a question, from `[question, answer]` each (LLaMA-Factory, ms-swift).

    Raises DataError.
    """
    if is_absent(history):
        return []
    history = from_json(history, name, "'history'")
    turns: list[Any] = []
    for pair in history if isinstance(history, list) else [history]:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise DataError(
                f"sample {name}: 'history' has {brief(pair)}, expected [question, answer] each"
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def most_frequent(answers: list[Any], name: str, key: str) -> str:
    """Of several answers the one that most gave, the first of those. Raises DataError."""
    texts = [text_of(answer, name, key) for answer in answers]
    if not texts:
        raise DataError(f"sample {name}: '{key}' holds no answer")
    return Counter(texts).most_common(1)[0][0]


def text_of(answer: Any, name: str, key: str) -> str:
    """An answer of a list, a text or VQAv2's `{"answer"}`. Raises DataError."""
    text = answer.get("answer") if isinstance(answer, dict) else answer
    if not isinstance(text, str):
        raise DataError(f"sample {name}: '{key}' has {brief(answer)}, expected texts")
    return text


def system_turn(record: dict[str, Any], name: str, turns: list[Any]) -> list[Any]:
    """The system text beside the turns as a turn, or nothing.

    Raises DataError where a turn has one too.
    """
    key, text = one_of(record, SYSTEM_KEYS, name, "the record")
    if key is None:
        return []
    if not isinstance(text, str):
        raise DataError(f"sample {name}: '{key}' is {brief(text)}, expected a text")
    for turn in turns:
        if isinstance(turn, dict) and {turn.get("role"), turn.get("from")} & {
            "system",
            "developer",
        }:
            raise DataError(f"sample {name} has a '{key}' and a system turn, expected one of them")
    return [{"role": "system", "content": text}]


def check_rest(record: dict[str, Any], name: str, rest: set[str]) -> list[Note]:
    """Notes of the keys `rest` that are not used.

    Raises DataError for those that would change what is learned.
    """
    check_refused(
        {key: record[key] for key in rest & RECORD_REFUSED.keys()},
        RECORD_REFUSED,
        name,
        "the record",
    )
    notes = []
    for key in sorted(rest - {*METADATA}):
        value = record[key]
        if value is None or value == "" or value == [] or value == {}:
            continue
        check_file_like(record, name, key)
        if key in WEIGHTS or key in NOT_LEARN_KEYS:
            check_weight(value, name, key)
        notes.append(Note("unused", f"a record's '{key}'"))
    return notes


def check_weight(value: Any, name: str, key: str) -> None:
    """Raises DataError for a record that is to be left out, or to count more or less than
    others."""
    if isinstance(value, bool):
        out = value == (key in NOT_LEARN_KEYS)
    elif isinstance(value, list | dict):
        out = key != "label"  # of each turn or token
    elif key in NOT_LEARN_KEYS:
        out = isinstance(value, int | float) and value != 0
    else:
        out = (
            isinstance(value, int | float) and value != 1 and key not in ("loss", "label", "train")
        )
    if out:
        raise DataError(
            f"sample {name}: the record has '{key}': {brief(value)}; every record counts the "
            "same: take it out of the file, or "
            "take the key out"
        )


def check_file_like(record: dict[str, Any], name: str, key: str) -> None:
    """Raises DataError for a key that holds a picture, a video or sound by its name, and is not
    read."""
    found = LOOKS_LIKE_FILE.fullmatch(key.lower())
    if not found or isinstance(record[key], int | float):
        return
    is_video = found["kind"] in ("video", "clip")
    if found["kind"] in ("audio", "sound", "speech"):
        raise DataError(
            f"sample {name}: the record has '{key}': {brief(record[key])}, sound, which no model "
            "here hears"
        )
    read = VIDEOS if is_video else IMAGES
    if found["number"] or all(is_absent(record.get(each)) for each in read):
        raise DataError(
            f"sample {name}: the record has '{key}': {brief(record[key])}, which is not read; "
            f"expected {' or '.join(read)}, a "
            "file or a list of them"
        )
