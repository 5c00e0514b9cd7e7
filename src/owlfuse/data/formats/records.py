"""A record with a chat becomes a `Sample`, by whichever names it has its turns, system text, tools
and pictures under."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.types import JsonObject, Media, Message, Note, Part, Sample, without_keys
from owlfuse.data.formats.marks import unescaped
from owlfuse.data.formats.turn_keys import (
    CALL_ROLES,
    IMAGES,
    LEARN_KEYS,
    NOT_LEARN_KEYS,
    QUESTION_REFUSED,
    REFUSED,
    ROLES,
    SYSTEM_KEYS,
    THOUGHT_KEYS,
    VIDEOS,
    brief,
    check_refused,
    from_json,
    is_absent,
    present_keys,
    single_value,
    tools_of,
)
from owlfuse.data.formats.turns import (
    EXPECTED_TURN,
    PAIR_KEYS,
    SIMPLE_TURNS,
    TURN_KEYS,
    files_of,
    read_turns,
    role_of,
    with_turn,
)

# Keys of a record's turns: a list, its JSON text, or a dict of lists of the same length.
CHATS = ("messages", "conversations", "conversation", "texts")

# Keys of a question and its answer in a record without turns: texts, lists of turns (trl), or a
# list of answers (VQA).
QUESTIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "response"),
)

QUESTION_KEYS = frozenset(key for pair in QUESTIONS for key in pair)

TOOLS = ("tools", "functions")
# Keys by which a validation source's questions are grouped and judged (see `evaluation`).
METADATA = ("kind", "kinds", "accepted")

# Keys that are shown or rendered, and so not repeated as metadata, which go into results.
NOT_METADATA = frozenset(("id", *SYSTEM_KEYS, *IMAGES, *VIDEOS, *TOOLS))

# Keys that would weight a whole record. Every record counts the same, so another value than 1 or
# true is refused.
WEIGHTS = ("sample_weight", "label", *LEARN_KEYS)
# Keys of a record that would change what is learned if they were left out, and what they are.
RECORD_REFUSED = {
    **REFUSED,
    "instruction": "a text beside the chat; write it as 'system', or into the question",
    "instructions": "a text beside the chat; write it as 'system', or into the question",
    "chat_template_kwargs": "options of a chat template; they are one for all samples",
    "rejected_response": "an answer that is not to be given; preference pairs are not read",
    "rejected_messages": "an answer that is not to be given; preference pairs are not read",
    "kto_tag": "a judgement of the answer; preference data are not read",
}

# Keys of a record that choose a piece of its video.
VIDEO_PIECES = dict.fromkeys(
    ("video_start", "video_end", "start", "end", "start_time", "end_time", "clip"),
    "a piece of the video, which is shown whole; cut the file",
)

# Words that ms-swift replaces by what a record has under `objects`.
OBJECTS = "objects"
OBJECT_MARKS = ("<ref-object>", "<bbox>")

# All keys of a record that some format reads or refuses; of a table, the columns that are read.
READ_KEYS = frozenset(
    {
        *CHATS,
        *QUESTION_KEYS,
        *NOT_METADATA,
        *METADATA,
        *WEIGHTS,
        *NOT_LEARN_KEYS,
        *RECORD_REFUSED,
        *QUESTION_REFUSED,
        *VIDEO_PIECES,
        *THOUGHT_KEYS,
        OBJECTS,
        "history",
    }
)

# Names of keys that hold a picture, a video or sound, except those of IMAGES and VIDEOS.
MEDIA_KEY = re.compile(
    r"(?P<kind>image|img|picture|photo|video|clip|audio|sound|speech)s?"
    r"(?P<number>_?\d+)?"
    r"(?:_?(?:local_?)?(?:file_?)?"
    r"(?:paths?|files?|names?|urls?|uris?|links?|bytes|base64(?:_str)?|b64|list))?"
)
# Names of keys that say which picture or video a record is about.
MEDIA_ID = re.compile(r"(?:image|img|picture|photo|video)_?ids?")
# The name of a picture's or a video's file, under whatever key (`file_name`, `frames`).
MEDIA_NAME = re.compile(
    r"[^\n]{1,500}\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|mkv|webm|avi|mov|m4v)", re.IGNORECASE
)


def read_chat(
    record: JsonObject,
    name: str,
    source: str,
    chat_key: str,
    images: list[Media] | None = None,
    videos: list[Media] | None = None,
) -> Sample:
    """Return a record with a chat, or with a question and its answer, as a sample called `name`.

    Args:
        chat_key: where the format has its turns; another of CHATS is read too.
        images, videos: by default those of the record.

    Raises:
        DataError: a record that is no chat, that has two, or that has what would change its meaning
            if it were left out.
    """
    # First, so that a key that cannot be honored is named whatever else is wrong.
    check_refused(record, RECORD_REFUSED, name, "the record")
    turns, used, answers = find_turns(record, name, chat_key)
    turns = [*system_turn(record, name, turns), *turns]
    # A tar's members are given by the caller, and its record names none of them.
    if images is None:
        images = files_of(record, IMAGES, name)
    if videos is None:
        videos = files_of(record, VIDEOS, name)
    shown: JsonObject = {"image": images, "video": videos}
    check_turn_pictures(turns, name, shown)
    messages, images, videos, notes = read_turns(turns, images, videos, name)
    check_objects(record, messages, name)

    metadata = without_keys(record, NOT_METADATA | used)
    notes += check_unused(metadata, name, shown)
    if answers:
        metadata["accepted"] = record.get("accepted") or answers
    if len(answers) > 1:
        text = "of several answers the most frequent is learned, and all are right in evaluation"
        notes.append(Note("assumed", text))
    has_history = not is_absent(record.get("history"))
    metadata = question_metadata(metadata, messages, name, has_history)
    tools = tools_of(record, name)
    return Sample(name, source, messages, images, metadata, videos, tools, notes)


def check_objects(record: JsonObject, messages: list[Message], name: str) -> None:
    """Raise DataError for marks in the texts whose names and places the record has beside the
    chat."""
    if is_absent(record.get(OBJECTS)):
        return
    for number, message in enumerate(messages, start=1):
        for part in message["content"]:
            for mark in OBJECT_MARKS:
                if mark in part.get("text", ""):
                    raise DataError(
                        f"sample {name} has {mark} in a text (turn {number}) for what is in "
                        f"'{OBJECTS}', which is not filled in; write names and places into the text"
                    )


def question_metadata(
    metadata: JsonObject, messages: list[Message], name: str, has_history: bool = False
) -> JsonObject:
    """Return metadata with what `evaluation` reads as it expects it: `accepted`, a list of texts,
    `kind`, a text, and `kinds`, a text for each question or one for all.

    Args:
        has_history: earlier questions stand before the record's own, to which `accepted` belongs.

    Raises:
        DataError: other values, or `accepted` beside several questions.
    """
    checked = {}
    for key, value in metadata.items():
        # A table fills what a row does not have with None.
        if key not in METADATA or value is not None:
            checked[key] = value
    questions = sum(message["role"] == "user" for message in messages)
    if "accepted" in checked:
        accepted = checked["accepted"]
        is_list = isinstance(accepted, list) and bool(accepted)
        # An empty text stands in every answer.
        if not is_list or not all(isinstance(text, str) and text.strip() for text in accepted):
            raise DataError(
                f"sample {name}: accepted is {brief(accepted)}, expected a list of texts that are "
                "not empty"
            )
        if questions > 1 and not has_history:
            raise DataError(
                f"sample {name} has accepted answers and {questions} questions, expected one"
            )
    if "kind" in checked:
        checked["kind"] = kind_text(checked["kind"], name, "kind")
    if "kinds" in checked:
        kinds = checked["kinds"]
        if not isinstance(kinds, list) or len(kinds) not in (0, 1, questions):
            raise DataError(
                f"sample {name}: 'kinds' is {brief(kinds)}, expected a list of one text for each "
                f"of its {questions} questions, or of one for all"
            )
        checked["kinds"] = [kind_text(kind, name, "kinds") for kind in kinds]
    return checked


def kind_text(kind: Any, name: str, key: str) -> str:
    """Return a kind of questions as a text, "" for None. Raises DataError."""
    if kind is None:
        return ""
    if not isinstance(kind, str | int):
        raise DataError(f"sample {name}: '{key}' has {brief(kind)}, expected a text")
    return str(kind)


def has_chat(record: JsonObject) -> bool:
    """Whether a record has turns, a question with an answer, or a conversation in one text."""
    if present_keys(record, CHATS) or is_conversation(record.get(TEXT)):
        return True
    return any(len(present_keys(record, pair)) == 2 for pair in QUESTIONS)


def find_turns(
    record: JsonObject, name: str, chat_key: str
) -> tuple[list[Any], set[str], list[str]]:
    """Return a record's turns, the keys that they are under, and the answers that are right where
    it lists them.

    Raises DataError.
    """
    chats = present_keys(record, CHATS)
    if len(chats) > 1:
        raise DataError(f"sample {name} has '{chats[0]}' and '{chats[1]}', expected one chat")
    if chats:
        if not is_absent(record.get("history")):
            raise DataError(
                f"sample {name} has 'history' beside '{chats[0]}'; write it as turns, it would be "
                "left out"
            )
        turns = turns_of(record[chats[0]], name, chats[0])
        # Before it there may be anything; behind a question there is its answer.
        if turns and ROLES.get(role_of(turns[-1]) or "") == "user":
            for key in present_keys(record, ("response", "completion", "answer")):
                raise DataError(
                    f"sample {name} has '{key}' beside '{chats[0]}', which ends with a question; "
                    "write it as the last turn"
                )
        return turns, {chats[0]}, []
    for question, answer in QUESTIONS:
        if len(present_keys(record, (question, answer))) == 2:
            return question_turns(record, name, question, answer)
    # An empty question or answer is told as such.
    for question, answer in QUESTIONS:
        if question in record and answer in record:
            return question_turns(record, name, question, answer)
    if chat_key in record:
        return turns_of(record[chat_key], name, chat_key), {chat_key}, []
    if is_conversation(record.get(TEXT)):
        return text_turns(record[TEXT]), {TEXT}, []
    keys = ", ".join(sorted(record)) or "nothing"
    raise DataError(f"sample {name} has no '{chat_key}'; it has {keys}; {EXPECTED}")


# The key of a whole conversation as one text, `Human: ...` and `AI: ...` a line each, as in
# mPLUG-Owl1's data.
TEXT = "text"
# The beginning of each of these texts. The chat template that belongs to them writes it.
OPENING = (
    "The following is a conversation between a curious human and AI assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)
SPEAKERS = re.compile(r"(?:\A|\n)[ \t]*(Human|AI):")
# For a text without line breaks.
SPEAKERS_IN_LINE = re.compile(r"(?:\A|\s)(Human|AI):(?=\s|\Z)")


def is_conversation(text: Any) -> bool:
    """Whether a text is a conversation as mPLUG-Owl1's data have it."""
    if not isinstance(text, str):
        return False
    _, speeches = split_speakers(text)
    return {speaker for speaker, _ in speeches} == {"Human", "AI"}


def split_speakers(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text before the first speaker, and (speaker, words) of each speech."""
    pattern = SPEAKERS if "\n" in text.strip() else SPEAKERS_IN_LINE
    opening, *pieces = pattern.split(text)
    words = [piece.strip() for piece in pieces[1::2]]
    return opening.strip(), list(zip(pieces[::2], words, strict=True))


def text_turns(text: str) -> list[dict[str, str]]:
    """Return the turns of a conversation in one text.

    What a user says in several speeches is one turn, as a picture and the question about it;
    another opening than the usual one is a system text.
    """
    opening, speeches = split_speakers(text)
    turns: list[dict[str, str]] = []
    if opening and opening != OPENING:
        turns.append({"role": "system", "content": opening})
    for speaker, words in speeches:
        role = "user" if speaker == "Human" else "assistant"
        # A chat template refuses two turns of the user in a row.
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
    """Return a list of turns, from a list, its JSON text, or a dict of lists, as `datasets` stores
    a Sequence of dicts."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(
                f"sample {name}: '{key}' is a str, expected list or its JSON text"
            ) from None
    if isinstance(value, dict):
        # datasets stores a list of dicts as a dict of lists, one for each key.
        columns = [column for column in value.values() if isinstance(column, list)]
        lengths = {len(column) for column in columns}
        if len(columns) == len(value) and len(lengths) == 1:
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise DataError(f"sample {name}: '{key}' is a {type(value).__name__}, expected list")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise DataError(
                f"sample {name}: a turn is {brief(turn)}, {EXPECTED_TURN} (turn {number})"
            )
    return value


def question_turns(
    record: JsonObject,
    name: str,
    question_key: str,
    answer_key: str,
) -> tuple[list[Any], set[str], list[str]]:
    """Return the turns of a record with a question and its answer, `history` before them; see
    `find_turns`."""
    used = {question_key, answer_key, "history"}
    check_single_question(record, name, question_key, answer_key)
    question, answer = record[question_key], number_as_text(record[answer_key])
    answers: list[str] = []
    if answer_key == "answer" and not is_absent(record.get("answers")):
        answers = answers_of(record["answers"], name, "answers")
        used.add("answers")
    if answer_key == "answers" and isinstance(answer, str):
        answer = list_of_text(answer, name, answer_key)
    # Under `prompt` (trl) a list holds turns; under a question it holds the answers of annotators.
    if isinstance(answer, list) and question_key != "prompt":
        texts = answers_of(answer, name, answer_key)
        if not texts:
            raise DataError(f"sample {name}: '{answer_key}' holds no answer")
        # Counter keeps the order of first occurrence: of equally frequent answers, the first.
        answer = Counter(texts).most_common(1)[0][0]
        answers = [*texts, *answers]
    if not isinstance(question, str | list) or not isinstance(answer, str | list):
        raise DataError(
            f"sample {name}: {question_key} is {brief(question)}, {answer_key} {brief(answer)}, "
            "expected texts"
        )
    if answers and isinstance(answer, str):
        # Each once, the learned one first.
        answers = [text for text in dict.fromkeys([answer, *answers]) if text.strip()]
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
        thought_key, thought = single_value(record, THOUGHT_KEYS, name, "the record")
        # A truth value may say whether the model is to think.
        if thought_key is not None and isinstance(thought, str):
            answer[0]["reasoning_content"] = thought
            used.add(thought_key)
    turns = history_turns(record.get("history"), name)
    turns += [without_learning(turn) for turn in question]
    return [*turns, *answer], used, answers


def check_single_question(
    record: JsonObject,
    name: str,
    question_key: str,
    answer_key: str,
) -> None:
    """Raise DataError where a record has a further question, answer, or part of a question."""
    for key in present_keys(record, QUESTION_REFUSED):
        raise DataError(
            f"sample {name} has '{key}' beside '{question_key}': write it into the question, it "
            "would be left out"
        )
    others = QUESTION_KEYS - {question_key, answer_key, "history"}
    for key in present_keys(record, sorted(others)):
        # `answers` beside an answer are the annotators'.
        if (answer_key, key) != ("answer", "answers"):
            raise DataError(
                f"sample {name} has '{key}' beside '{question_key}' and '{answer_key}', expected "
                "one question and one answer; take out what is not meant"
            )


def without_learning(turn: Any) -> Any:
    """Return a turn of a prompt, from which nothing is learned: as trl does, which learns from the
    completion alone."""
    if not isinstance(turn, dict):
        return turn
    role = role_of(turn)
    # A turn without a role is a question with its answer, and the key is the answer's.
    says_answer = role is None or role in CALL_ROLES or ROLES.get(role) == "assistant"
    return {**turn, "loss": False} if says_answer else turn


def history_turns(history: Any, name: str) -> list[Any]:
    """Return the turns before a question, from `[question, answer]` each (LLaMA-Factory, ms-swift).

    Raises DataError.
    """
    if is_absent(history):
        return []
    history = from_json(history, name, "'history'")
    turns: list[Any] = []
    for pair in history if isinstance(history, list) else [history]:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"sample {name}: 'history' has {brief(pair)}, expected [question, answer] each"
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def number_as_text(answer: Any) -> Any:
    """Return a whole number, as counts among answers are, as a text; another value as it is."""
    return str(answer) if type(answer) is int else answer


def answers_of(value: Any, name: str, key: str) -> list[str]:
    """Return the answers of annotators, one or a list of them, texts or VQAv2's `{"answer"}`,
    without blank ones. Raises DataError."""
    if isinstance(value, str):
        value = list_of_text(value, name, key)
    entries = [value] if isinstance(value, str | int) else value
    if not isinstance(entries, list):
        raise DataError(f"sample {name}: '{key}' is {brief(value)}, expected a list of texts")
    texts = []
    for entry in entries:
        text = number_as_text(entry.get("answer") if isinstance(entry, dict) else entry)
        if not isinstance(text, str):
            raise DataError(f"sample {name}: '{key}' has {brief(entry)}, expected texts")
        if text.strip():
            texts.append(text)
    return texts


def list_of_text(text: str, name: str, key: str) -> str | list[str]:
    """Return the texts of a list that is written as JSON or as Python writes it; another text as it
    is. Raises DataError for one that numpy has written."""
    if not text.lstrip().startswith("["):
        return text
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
    is_python = value is None
    if is_python:
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text.strip())
    if not isinstance(value, list):
        return text
    texts = [item for item in value if item is not None]
    if not all(isinstance(item, str) for item in texts):
        return text
    # Python joins texts that stand side by side.
    if is_python and re.search(r"""(?<=[^\\,\[\s])['"]\s+['"]""", text):
        raise DataError(
            f"sample {name}: '{key}' is {brief(text)}, a list without commas; write it as JSON"
        )
    return texts


def system_turn(record: JsonObject, name: str, turns: list[Any]) -> list[Any]:
    """Return the system text beside the turns as a turn, or nothing.

    Raises DataError where a turn has one too.
    """
    key, text = single_value(record, SYSTEM_KEYS, name, "the record")
    if key is None:
        return []
    if not isinstance(text, str):
        raise DataError(f"sample {name}: '{key}' is {brief(text)}, expected a text")
    for turn in turns:
        if isinstance(turn, dict) and ROLES.get(role_of(turn) or "") == "system":
            raise DataError(f"sample {name} has a '{key}' and a system turn, expected one of them")
    return [{"role": "system", "content": text}]


def caption_messages(
    record: JsonObject,
    name: str,
    caption: Any,
    instructions: Sequence[str] | None,
    identity: str,
    images: int,
    videos: int = 0,
) -> list[Message]:
    """Return a chat that asks for a caption: the record's system text, the images, the videos, one
    of the `instructions` (none: nothing more), and the caption. Which instruction is a hash of
    `identity`, so that it is the same in every run and whatever the other samples are.

    Raises:
        DataError: a caption or a system text that is no text.
    """
    if not isinstance(caption, str):
        raise DataError(f"sample {name}: the caption is {brief(caption)}, expected a text")
    messages: list[Message] = []
    for turn in system_turn(record, name, []):
        part = {"type": "text", "text": unescaped(turn["content"])}
        messages.append({"role": "system", "content": [part]})
    question: list[Part] = [{"type": "image"} for _ in range(images)]
    question += [{"type": "video"} for _ in range(videos)]
    if instructions:
        # Python's hash() differs between processes.
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
        number = int.from_bytes(digest[:8], "little")
        text = f"\n{instructions[number % len(instructions)]}"
        question.append({"type": "text", "text": text})
    messages.append({"role": "user", "content": question})
    answer = [{"type": "text", "text": unescaped(caption)}]
    messages.append({"role": "assistant", "content": answer})
    return messages


def check_unused(unused: JsonObject, name: str, shown: JsonObject) -> list[Note]:
    """Return notes of a record's keys that are not used.

    Args:
        shown: has the pictures and videos of the sample, if there are any, under IMAGES and VIDEOS.

    Raises:
        DataError: a key that would change what is learned.
    """
    check_refused(unused, RECORD_REFUSED, name, "the record")
    if present_keys(shown, VIDEOS):
        check_refused(unused, VIDEO_PIECES, name, "the record")
    notes = []
    for key in sorted(unused.keys() - METADATA):
        value = unused[key]
        if value is None or value == "" or value == [] or value == {}:
            continue
        check_media_key(value, name, key, shown)
        check_media_name(value, name, key, shown)
        if MEDIA_ID.fullmatch(key.lower()) and not present_keys(shown, (*IMAGES, *VIDEOS)):
            raise DataError(
                f"sample {name}: the record has '{key}': {brief(value)}, and no picture or video; "
                "name the file in image or video"
            )
        if key in WEIGHTS or key in NOT_LEARN_KEYS:
            check_weight(value, name, key)
        notes.append(Note("unused", f"a record's '{key}'"))
    return notes


def check_weight(value: Any, name: str, key: str) -> None:
    """Raise DataError for a record that is to be left out, or to count more or less than
    others."""
    written = value
    if isinstance(value, str):
        value = value_of_text(value)
    is_number = isinstance(value, int | float)
    if isinstance(value, bool):
        # False of `train` and true of `ignore` both exclude the record.
        is_weighted = value == (key in NOT_LEARN_KEYS)
    elif isinstance(value, list | dict):
        is_weighted = key != "label"  # a weight of each turn or token
    elif key in NOT_LEARN_KEYS:
        is_weighted = is_number and value != 0
    elif key == "label":
        is_weighted = False  # a class
    elif key == "loss":
        is_weighted = is_number and value == 0  # another number is a measurement
    else:
        is_weighted = is_number and value != 1
    if is_weighted:
        raise DataError(
            f"sample {name}: the record has '{key}': {brief(written)}; every record counts the "
            "same: take it out of the file, or take the key out"
        )


def value_of_text(text: str) -> bool | float | str:
    """Return the number or the truth value that a text spells, as every value of a CSV file is a
    text; another text as it is."""
    word = text.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word)
    except ValueError:
        return text


def check_turn_pictures(turns: list[Any], name: str, shown: JsonObject) -> None:
    """Raise DataError for a key of a turn by which it names a picture, a video or sound, and which
    is not read."""
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or turn.keys() in SIMPLE_TURNS:
            continue
        try:
            for key in present_keys(turn, turn.keys() - TURN_KEYS - PAIR_KEYS):
                check_media_key(turn[key], name, key, shown, "a turn")
                check_media_name(turn[key], name, key, shown, "a turn")
        except DataError as error:
            raise with_turn(error, number) from None


def check_media_key(
    value: Any, name: str, key: str, shown: JsonObject, where: str = "the record"
) -> None:
    """Raise DataError for a key that holds a picture, a video or sound by its name, and is not
    read.

    Args:
        where: what has the key, for messages.
    """
    match = MEDIA_KEY.fullmatch(key.lower())
    if not match or isinstance(value, int | float):
        return
    if match["kind"] in ("audio", "sound", "speech"):
        raise DataError(
            f"sample {name}: {where} has '{key}': {brief(value)}, sound, which no model here hears"
        )
    keys = VIDEOS if match["kind"] in ("video", "clip") else IMAGES
    # Beside `image`, an `image_path` often names the same picture, but an `image_2` is another one.
    if match["number"] or not present_keys(shown, keys):
        raise DataError(
            f"sample {name}: {where} has '{key}': {brief(value)}, which is not read; "
            f"expected {' or '.join(keys)}, a file or a list of them"
        )


def check_media_name(
    value: Any, name: str, key: str, shown: JsonObject, where: str = "the record"
) -> None:
    """Raise DataError for a key whose value names pictures or videos, in a record that shows
    none."""
    if present_keys(shown, (*IMAGES, *VIDEOS)):
        return
    names = value if isinstance(value, list) else [value]
    if all(isinstance(entry, str) and MEDIA_NAME.fullmatch(entry) for entry in names):
        raise DataError(
            f"sample {name}: {where} has '{key}': {brief(value)}, which is not read, and no "
            "picture; expected image, images, video or videos, a file or a list of them"
        )
