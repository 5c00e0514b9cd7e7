"""Records as others write them: every format reads every shape alike, and nothing that changes
the meaning is left out."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shards import write_tar

from chats import png
from owlfuse.core.errors import DataError
from owlfuse.core.types import Note
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.parquet import Parquet
from owlfuse.data.formats.sharegpt import ShareGPT
from owlfuse.data.formats.webdataset import WebDataset
from owlfuse.data.notes import NotesLog


def json_lines(kind):
    def read(folder, records, **options):
        (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return kind(str(folder / "a.jsonl"), **options)

    return read


def json_list(folder, records):
    (folder / "a.json").write_text(json.dumps(records))
    return LLaVA(str(folder / "a.json"))


def parquet(folder, records, **options):
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
    return Parquet(str(folder / "a.parquet"), cache_dir=str(folder / "cache"), **options)


def arrow(folder, records):
    rows = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(str(folder / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    return Parquet(str(folder / "a.arrow"))


def webdataset(folder, records):
    write_tar(
        folder / "a.tar", [(f"{number:03d}.json", record) for number, record in enumerate(records)]
    )
    return WebDataset(str(folder / "a.tar"))


CHAT_FORMATS = {
    "llava": json_lines(LLaVA),
    "llava-json": json_list,
    "sharegpt": json_lines(ShareGPT),
    "messages": json_lines(Messages),
    "parquet": parquet,
    "arrow": arrow,
    "webdataset": webdataset,
}
every_format = pytest.mark.parametrize("read", CHAT_FORMATS.values(), ids=CHAT_FORMATS)


def said(message):
    """A message as a line: its role, its text with pictures in brackets, and its other keys."""
    text = "".join(part.get("text", f"[{part['type']}]") for part in message["content"])
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    return (message["role"], text, others) if others else (message["role"], text)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


PICTURE = [("user", "[image]\nWhat color?"), ("assistant", "Red.")]
FLAT = [user("<image>\nWhat color?"), assistant("Red.")]
FROM = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "Red."}]
BARE = [user("What color?"), assistant("Red.")]
SYSTEM = ("system", "Be brief.")
TEXT = [("user", "Hi"), ("assistant", "Ho.")]
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "zoom", "description": "Closer."}}

SHAPES = {
    "messages": ({"image": "a.png", "messages": FLAT}, PICTURE),
    "conversations": ({"image": "a.png", "conversations": FROM}, PICTURE),
    "conversation": ({"images": ["a.png"], "conversation": FROM}, PICTURE),
    "json-text": ({"image": "a.png", "conversations": json.dumps(FROM)}, PICTURE),
    "dict-of-lists": (
        {
            "image": "a.png",
            "messages": {k: [turn[k] for turn in FLAT] for k in ("role", "content")},
        },
        PICTURE,
    ),
    "cauldron": (
        {"images": ["a.png"], "texts": [{"user": "What color?", "assistant": "Red."}]},
        PICTURE,
    ),
    "xtuner": (
        {
            "image": "a.png",
            "conversation": [
                {"system": "Be brief.", "input": "<image>\nWhat color?", "output": "Red."}
            ],
        },
        [SYSTEM, *PICTURE],
    ),
    "trl-texts": ({"image": "a.png", "prompt": "What color?", "completion": "Red."}, PICTURE),
    "trl-turns": ({"image": "a.png", "prompt": FLAT[:1], "completion": FLAT[1:]}, PICTURE),
    "trl-given-answer": (
        {
            "prompt": [user("Hi"), assistant("Ho."), user("Sure?")],
            "completion": [assistant("Yes.")],
        },
        [
            ("user", "Hi"),
            ("assistant", "Ho.", {"supervised": False}),
            ("user", "Sure?"),
            ("assistant", "Yes."),
        ],
    ),
    "ms-swift": (
        {"query": "Sure?", "response": "Yes.", "history": [["Hi", "Ho."]]},
        [*TEXT, ("user", "Sure?"), ("assistant", "Yes.")],
    ),
    "question": ({"image": "a.png", "question": "What color?", "answer": "Red."}, PICTURE),
    "answers": (
        {"image": "a.png", "question": "What color?", "answers": ["Blue.", "Red.", "Red."]},
        PICTURE,
    ),
    "vqav2": (
        {"image": "a.png", "question": "What color?", "answers": [{"answer": "Red.", "id": 1}]},
        PICTURE,
    ),
    "unmarked": ({"image": "a.png", "messages": BARE}, PICTURE),
    "owl-mark": (
        {"image": "a.png", "messages": [user("<|image|>\nWhat color?"), assistant("Red.")]},
        PICTURE,
    ),
    "turn-picture": (
        {"messages": [{**user("What color?"), "images": ["a.png"]}, assistant("Red.")]},
        PICTURE,
    ),
    "turn-picture-marked": (
        {"messages": [{**user("<image>\nWhat color?"), "image": "a.png"}, assistant("Red.")]},
        PICTURE,
    ),
    "parts": (
        {
            "image": "a.png",
            "messages": [
                user([{"type": "image"}, {"type": "text", "text": "\nWhat color?"}]),
                assistant([{"type": "text", "text": "Red."}]),
            ],
        },
        PICTURE,
    ),
    "marks-in-parts": (
        {
            "image": "a.png",
            "messages": [
                user([{"type": "text", "text": "<image>\nWhat color?"}]),
                assistant([{"type": "text", "text": "Red."}]),
            ],
        },
        PICTURE,
    ),
    **{
        f"{key}-{where}": (
            {
                "image": "a.png",
                **({key: "Be brief."} if where == "record" else {}),
                "conversations": [
                    {**FROM[0], **({key: "Be brief."} if where == "turn" else {})},
                    FROM[1],
                ],
            },
            [SYSTEM, *PICTURE],
        )
        for key in ("system", "system_prompt", "system_message")
        for where in ("record", "turn")
    },
    **{
        f"role-{role}": (
            {"image": "a.png", "messages": [{"role": role, "content": "Be brief."}, *FLAT]},
            [SYSTEM, *PICTURE],
        )
        for role in ("system", "developer", "System", "system-prompt")
    },
    "sharegpt-tools": (
        {
            "conversations": [
                {"from": "human", "value": "Closer"},
                {
                    "from": "function_call",
                    "value": json.dumps({"name": "zoom", "arguments": {"x": 1}}),
                },
                {"from": "observation", "value": "done"},
                {"from": "gpt", "value": "There."},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        [
            ("user", "Closer"),
            ("assistant", "", {"tool_calls": [CALL]}),
            ("tool", "done"),
            ("assistant", "There."),
        ],
    ),
    "openai-tools": (
        {
            "messages": [
                user("Closer"),
                assistant(
                    "Wait.",
                    tool_calls=[
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "zoom", "arguments": '{"x": 1}'},
                        }
                    ],
                ),
                {"role": "tool", "content": "done", "tool_call_id": "c1"},
                assistant("There."),
            ],
            "tools": [TOOL],
        },
        [
            ("user", "Closer"),
            ("assistant", "Wait.", {"tool_calls": [{**CALL, "id": "c1"}]}),
            ("tool", "done", {"tool_call_id": "c1"}),
            ("assistant", "There."),
        ],
    ),
    "thought": (
        {"messages": [user("Hi"), assistant("Ho.", reasoning_content="A greeting.")]},
        [("user", "Hi"), ("assistant", "Ho.", {"reasoning_content": "A greeting."})],
    ),
    "not-learned": (
        {
            "messages": [
                user("Hi"),
                assistant("Hu.", loss=False),
                user("?"),
                assistant("Ho.", loss=True),
            ]
        },
        [
            ("user", "Hi"),
            ("assistant", "Hu.", {"supervised": False}),
            ("user", "?"),
            ("assistant", "Ho."),
        ],
    ),
    "llava-video": (
        {"video": "a.mp4", "conversations": FROM},
        [("user", "[video]\nWhat color?"), ("assistant", "Red.")],
    ),
    "video": (
        {"videos": ["a.mp4"], "messages": [user("<video>\nWhat color?"), assistant("Red.")]},
        [("user", "[video]\nWhat color?"), ("assistant", "Red.")],
    ),
    "word-in-answer": (
        {"messages": [user("List SVG elements."), assistant("<image>, <video> and <audio>.")]},
        [("user", "List SVG elements."), ("assistant", "<image>, <video> and <audio>.")],
    ),
    "escaped": (
        {
            "image": "a.png",
            "messages": [user("<image>\nA \\<image> or \\<video>?"), assistant("An <image>.")],
        },
        [("user", "[image]\nA <image> or <video>?"), ("assistant", "An <image>.")],
    ),
    "word-in-parts": (
        {
            "messages": [
                user(
                    [
                        {"type": "image", "path": "a.png"},
                        {"type": "text", "text": "\nIs <image> a tag?"},
                    ]
                ),
                assistant([{"type": "text", "text": "Yes, <image>."}]),
            ]
        },
        [("user", "[image]\nIs <image> a tag?"), ("assistant", "Yes, <image>.")],
    ),
    "no-picture": (
        {
            "image": None,
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho."}],
        },
        TEXT,
    ),
    "empty-picture": (
        {
            "image": "",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho."}],
        },
        TEXT,
    ),
}


@every_format
@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_reads_every_shape_alike(tmp_path, read, shape):
    record, expected = SHAPES[shape]
    sample = read(tmp_path, [record])[0]
    assert [said(message) for message in sample.messages] == expected
    shown = "".join(text for _, text, *_ in expected)
    assert (sample.images, sample.videos) == (
        ["a.png"] * shown.count("[image]"),
        ["a.mp4"] * shown.count("[video]"),
    )
    assert sample.tools == (None if "tools" not in record else [TOOL])
    assert [note for note in sample.notes if note.kind == "unused"] == []


@every_format
def test_keys_that_other_records_have_are_not_there(tmp_path, read):
    """`datasets` fills what a row has not with None."""
    nothing = dict.fromkeys(
        (
            "tool_calls",
            "name",
            "loss",
            "weight",
            "prefix",
            "reasoning_content",
            "audio",
            "system",
            "markdown",
        )
    )
    record = {
        "messages": [{**turn, **nothing} for turn in BARE],
        "chosen": None,
        "rejected": None,
        "image": "a.png",
        "label": None,
    }
    sample = read(tmp_path, [record, {**record, "image": None}])[1]
    assert [said(message) for message in sample.messages] == [
        ("user", "What color?"),
        ("assistant", "Red."),
    ]
    assert [note.text for note in sample.notes if "column" not in note.text] == []


def test_a_tool_that_a_table_fills_with_nothing_is_as_it_was(tmp_path):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {name: {"type": "string"}}}}
        for name in ("a", "b")
    ]
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("a", "b")]
    records = [
        {"messages": [user("Hi"), assistant("Ho.", tool_calls=[call])], "tools": [tool]}
        for tool, call in zip(tools, calls)
    ]
    source = parquet(tmp_path, records)
    assert [source[n].tools for n in range(2)] == [[tool] for tool in tools]
    arguments = [source[n].messages[1]["tool_calls"][0]["function"]["arguments"] for n in range(2)]
    assert arguments == [{"a": 1}, {"b": 1}]


TURN_REFUSED = {
    "prefix": (True, "'prefix': True, the beginning of an answer"),
    "mask": (True, "'mask': True, which some read as"),
    "weight": (0.5, "'weight': 0.5, expected 1 or true, 0 or false"),
    "loss_scale": (2, "'loss_scale': 2, expected 1 or true"),
    "train_detail": ([{"begin_offset": 0}], "which parts of an answer are learned from"),
    "refusal": ("No.", "'refusal': No., a refusal beside the content"),
    "audio": ("a.wav", "'audio': a.wav, sound"),
    "rejected": ("Blue.", "'rejected': Blue., an answer that is not to be given"),
    "reasoning_content": (
        [3],
        "'reasoning_content' in a turn of the assistant is .3., expected an answer's text",
    ),
    "name": (3, "'name' of a turn is 3, expected a text"),
    "tool_calls": (["x"], "a tool call is x, expected JSON"),
    "system": (
        "Be kind.",
        "a turn has 'system': Be kind., expected a text in the first turn .turn 2.",
    ),
}


@every_format
@pytest.mark.parametrize("key", TURN_REFUSED)
def test_a_key_of_a_turn_that_changes_its_meaning_is_refused(tmp_path, read, key):
    value, message = TURN_REFUSED[key]
    with pytest.raises(DataError, match=f"sample a:.*{message}") as error:
        read(tmp_path, [{"messages": [user("Hi"), assistant("Ho.", **{key: value})]}])[0]
    assert "\n" not in str(error.value)


RECORD_REFUSED = {
    "rejected": ("Blue.", "preference pairs are not read"),
    "rejected_response": ("Blue.", "preference pairs are not read"),
    "chosen": ([user("Hi")], "preference pairs are not read"),
    "kto_tag": (True, "preference data are not read"),
    "label": (False, "every record counts the same"),
    "weight": (0.5, "every record counts the same"),
    "train": (False, "every record counts the same"),
    "instruction": ("Be kind.", "write it as 'system'"),
    "audio": ("a.wav", "sound, which no model here hears"),
    "documents": (["x"], "documents, which no chat template here is given"),
    "chat_template_kwargs": ({"enable_thinking": False}, "options of a chat template"),
    "img_path": ("a.png", "img_path"),
    "image_2": ("a.png", "image_2"),
    "video_url": ("a.mp4", "video_url"),
    "speech": ("a.wav", "speech"),
    "conversations": (FROM, "has 'messages' and 'conversations', expected one chat"),
}


@every_format
@pytest.mark.parametrize("key", RECORD_REFUSED)
def test_a_key_of_a_record_that_changes_its_meaning_is_refused(tmp_path, read, key):
    value, message = RECORD_REFUSED[key]
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, [{"messages": [user("Hi"), assistant("Ho.")], key: value}])[0]
    assert "\n" not in str(error.value)


@every_format
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": [user("Hi")], "chosen": [assistant("Ho.")], "rejected": [assistant("Hu.")]},
            "preference pairs|no chat among|expected a picture",
        ),
        (
            {"image": "a.png", "question": "?", "answer": 3.5},
            "question is ., answer 3.5, expected texts",
        ),
        (
            {"image": "a.png", "question": "?", "answers": [0.5]},
            "'answers' has 0.5, expected texts",
        ),
        (
            {"question": "?", "answer": "b", "choices": ["a", "b"]},
            "has 'choices' beside 'question': write it into the question",
        ),
        ({"question": "?", "answer": "b", "context": "c"}, "has 'context' beside 'question'"),
        (
            {"question": "?", "answer": "b", "candidates": ["a", "b"]},
            "has 'candidates' beside 'question'",
        ),
        ({"question": "?", "answer": "B", "choice_a": "One"}, "has 'choice_a' beside 'question'"),
        ({"question": "?", "answer": "B", "A": "One", "B": "Two"}, "has 'A' beside 'question'"),
        ({"question": "?", "answers": ["b"], "document": "c"}, "has 'document' beside 'question'"),
        (
            {"question": "?", "answers": "['yes' 'yes'\n 'no']"},
            "'answers' is .*, a list without commas; write it as JSON",
        ),
        (
            {"images": ["x"], "texts": ["Some text.", "More."]},
            "a turn is Some text., expected from or role",
        ),
        ({"messages": [{"role": "user", "content": None}, assistant("Ho.")]}, "a turn is .*None"),
        (
            {"query": "?", "response": "!", "history": [["only a question"]]},
            "'history' has .*expected .question, answer. each",
        ),
        (
            {"messages": [user("Hi"), assistant("Ho.")], "tools": "no JSON"},
            "'tools' is no JSON, expected JSON",
        ),
        (
            {"messages": [user("Hi"), {"role": "function_call", "content": "no JSON"}]},
            "a tool call is no JSON, expected JSON",
        ),
    ],
)
def test_what_is_no_chat_is_told_in_a_line(tmp_path, read, record, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, [record])[0]
    assert "\n" not in str(error.value)


LEARNED = [
    "loss",
    "train",
    "supervised",
    "weight",
    "loss_weight",
    "loss_mask",
    "train_on",
    "train_on_turn",
    "trainable",
    "learn",
]


@pytest.mark.parametrize("key", LEARNED)
@pytest.mark.parametrize(
    ("value", "learned"),
    [(True, True), (1, True), (1.0, True), (False, False), (0, False), (0.0, False)],
)
def test_what_is_learned_from_has_many_names(tmp_path, key, value, learned):
    record = {"messages": [user("Hi"), assistant("Ho.", **{key: value})]}
    sample = CHAT_FORMATS["messages"](tmp_path, [record])[0]
    assert sample.messages[1].get("supervised", True) == learned
    assert "supervised" not in sample.messages[0]
    for turn, message in (
        ({**user("Hi"), key: value}, "only what the assistant says is learned"),
        (None, None),
    ):
        source = CHAT_FORMATS["messages"](
            tmp_path, [{"messages": [turn or user("Hi"), assistant("Ho.")]}]
        )
        if turn and learned:
            with pytest.raises(DataError, match=message):
                source[0]
        else:
            assert "supervised" not in source[0].messages[0]


EARLIER_ANSWERS = {
    "upper-case": [assistant("Ho.", role="Assistant")],
    "model": [assistant("Ho.", role="model")],
    "bot": [{"from": "bot", "value": "Ho."}],
    "chatgpt": [{"from": "chatgpt", "value": "Ho."}],
    "call": [{"role": "function_call", "content": '{"name": "f", "arguments": {}}'}],
    "pair": [{"user": "Why?", "assistant": "So."}],
}


@pytest.mark.parametrize("turns", EARLIER_ANSWERS.values(), ids=EARLIER_ANSWERS)
def test_no_answer_in_a_prompt_is_learned_whatever_its_role_is_called(tmp_path, turns):
    record = {"prompt": [user("Hi"), *turns, user("Sure?")], "completion": [assistant("Yes.")]}
    messages = CHAT_FORMATS["messages"](tmp_path, [record])[0].messages
    answers = [message for message in messages if message["role"] == "assistant"]
    assert [answer.get("supervised", True) for answer in answers] == [False, True]


@pytest.mark.parametrize("key", ["masked", "ignore", "ignore_loss", "exclude"])
@every_format
def test_an_answer_that_is_marked_as_left_out_is_read_and_not_learned(tmp_path, read, key):
    turns = [
        user("Hi"),
        assistant("Ho.", **{key: True}),
        user("Sure?"),
        assistant("Yes.", **{key: False}),
    ]
    messages = read(tmp_path, [{"messages": turns}])[0].messages
    assert [message.get("supervised", True) for message in messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_on", False),
        ("trainable", False),
        ("learn", False),
        ("masked", True),
        ("ignore", True),
        ("loss_mask", [0, 1]),
        ("train", 0),
        ("train", "false"),
        ("loss", 0),
        ("weight", "0"),
        ("weight", "0.5"),
        ("exclude", "true"),
        ("ignored", "1"),
        ("label", "False"),
    ],
)
@every_format
def test_a_record_that_is_not_to_be_learned_is_refused(tmp_path, read, key, value):
    source = read(tmp_path, [{"messages": FLAT, "image": "a.png", key: value}])
    with pytest.raises(DataError, match=f"the record has '{key}': .*every record counts the same"):
        source[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train", "1.0"),
        ("weight", "true"),
        ("exclude", "false"),
        ("masked", "0"),
        ("label", "3"),
        ("label", 0),
        ("loss", 2.5),
        ("train", "split-a"),
    ],
)
def test_a_record_that_counts_as_the_others_is_read(tmp_path, key, value):
    record = {"messages": [user("Hi"), assistant("Ho.")], key: value}
    assert CHAT_FORMATS["messages"](tmp_path, [record])[0].messages[1]["content"]


@every_format
@pytest.mark.parametrize("answers", [{"answer": 3}, {"answer": 0}, {"answers": [3, 2, 3]}], ids=str)
def test_an_answer_that_is_a_whole_number_is_its_text(tmp_path, read, answers):
    sample = read(tmp_path, [{"image": "a.png", "question": "How many?", **answers}])[0]
    text = "0" if answers == {"answer": 0} else "3"
    assert sample.messages[1]["content"] == [{"type": "text", "text": text}]


@pytest.mark.parametrize("key", ["ignore", "exclude", "masked"])
def test_a_question_that_is_not_left_out_is_no_mistake(tmp_path, key):
    turns = [{**user("Hi"), key: False}, assistant("Ho.", **{key: False})]
    messages = CHAT_FORMATS["messages"](tmp_path, [{"messages": turns}])[0].messages
    assert not any("supervised" in message for message in messages)


def test_names_that_contradict_each_other_are_refused(tmp_path):
    record = {"messages": [user("Hi"), assistant("Ho.", loss=True, weight=0)]}
    with pytest.raises(
        DataError, match="'loss': True and 'weight': 0, which contradict each other"
    ):
        CHAT_FORMATS["messages"](tmp_path, [record])[0]


@every_format
def test_what_is_not_used_is_told_once_for_a_source(tmp_path, read, caplog):
    chat = [{**user("Hi"), "markdown": "x"}, assistant("Ho.", language="en")]
    source = read(tmp_path, [{"messages": chat, "topic": "dogs"}] * 3)
    column = "the column" if isinstance(source, Parquet) else "a record's"
    log = NotesLog()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # two workers
            for index in range(3):
                sample = source[index]
                log.add([("a", sample.id, note, 1) for note in sample.notes])
    assert (
        log.counts["a", f"not used: {column} 'topic'"]
        == log.counts["a", "not used: a turn's 'language'"]
        == 6
    )
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("source a: not used: ")
    for text in (
        "a turn's 'language'",
        "a turn's 'markdown'",
        f"{column} 'topic'",
        "(first in sample a:0",
    ):
        assert text in line


@every_format
def test_a_picture_without_a_mark_is_counted(tmp_path, read):
    source = read(
        tmp_path, [{"messages": BARE, "image": "a.png"}, {"messages": FLAT, "image": "a.png"}]
    )
    assert [[note.kind for note in source[n].notes] for n in (0, 1, 0)] == [
        ["assumed"],
        [],
        ["assumed"],
    ]


MARKS = {
    "two-of-three": (
        {"images": ["a", "b", "c"], "messages": [user("<image><image>"), assistant("!")]},
        None,
    ),
    "too-many": ({"images": ["a"], "messages": [user("<image><image>"), assistant("!")]}, None),
    "in-an-answer-alone": ({"image": "a", "messages": [user("?"), assistant("See <image>")]}, None),
    "none-there": (
        {"messages": [user("<image>?"), assistant("!")]},
        "1 <image> placeholders and 0 images: name a file in .*, or write",
    ),
    "no-video": (
        {"messages": [user("<video>?"), assistant("!")]},
        "1 <video> placeholders and 0 videos: name a file in 'video'",
    ),
    "numbered": (
        {"images": ["a"], "messages": [user("<image_1>?"), assistant("!")]},
        "<image_1> in its text",
    ),
    "qwen": (
        {"images": ["a"], "messages": [user("<|vision_start|>?"), assistant("!")]},
        r"<\|vision_start\|> in its text",
    ),
    "capital": (
        {"images": ["a"], "messages": [user("<ImageHere>?"), assistant("!")]},
        "<ImageHere> in its text",
    ),
    "part-and-mark": (
        {
            "messages": [
                user([{"type": "image", "path": "a"}]),
                assistant("!"),
                user("<image>?"),
                assistant("!"),
            ]
        },
        "more image parts without a file",
    ),
    "turn-with-two": (
        {"messages": [{**user("<image>?"), "images": ["a", "b"]}, assistant("!")]},
        "2 images and 1 <image> placeholders",
    ),
    "part-of-a-video": (
        {
            "messages": [
                user([{"type": "video", "video": "a.mp4", "video_start": 3}]),
                assistant("!"),
            ]
        },
        "'video_start' chooses a piece",
    ),
    "path-in-text": (
        {"messages": [user("<img>a.jpg</img>?"), assistant("!")]},
        "<img>a.jpg</img> in its text; write <image>",
    ),
    "frames": (
        {"messages": [user([{"type": "video", "video": ["a.png", "b.png"]}]), assistant("!")]},
        "a list of frames",
    ),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_that_do_not_fit_the_pictures_are_refused(tmp_path, name):
    from owlfuse.data.chat.checks import check_pictures

    record, message = MARKS[name]
    source = CHAT_FORMATS["messages"](tmp_path, [record])
    with pytest.raises(DataError, match=message or "placeholders and|in a turn of the assistant"):
        check_pictures(source[0])


def test_alpaca_takes_history_and_system_and_refuses_what_it_cannot_carry(tmp_path):
    read = json_lines(Alpaca)
    record = {
        "instruction": "Sure?",
        "input": "",
        "output": "<image>",
        "system": "Be brief.",
        "history": [["Hi", "Ho."]],
    }
    sample = read(tmp_path, [{**record, "tools": [TOOL], "topic": "x"}])[0]
    expected = [SYSTEM, *TEXT, ("user", "Sure?"), ("assistant", "<image>")]
    assert ([said(message) for message in sample.messages], sample.tools) == (expected, [TOOL])
    assert sample.notes == [Note("unused", "a record's 'topic'")]
    wrong = {
        "images": ["a.png"],
        "messages": BARE,
        "context": "x",
        "rejected": "x",
        "weight": 0.5,
        "input": 3,
    }
    for key, value in wrong.items():
        with pytest.raises(DataError, match=f"'{key}'"):
            read(tmp_path, [{**record, key: value}])[0]


def test_captions_take_a_system_text_and_refuse_a_question(tmp_path):
    read = json_lines(Captions)
    sample = read(
        tmp_path, [{"image": "a.png", "caption": "A dog.", "system": "Be brief.", "score": 3}]
    )[0]
    assert [said(message) for message in sample.messages] == [
        SYSTEM,
        ("user", "[image]"),
        ("assistant", "A dog."),
    ]
    assert sample.notes == [Note("unused", "a record's 'score'")]
    for key, value in {
        "question": "?",
        "tools": [TOOL],
        "images": ["b.png"],
        "image_2": "b.png",
        "rejected": "A cat.",
    }.items():
        with pytest.raises(DataError, match=f"'{key}'"):
            read(tmp_path, [{"image": "a.png", "caption": "A dog.", key: value}])[0]


def test_a_message_says_where_the_record_stands_as_the_file_counts(tmp_path):
    good, bad = {"messages": BARE}, {"messages": [user(3)]}
    places = {
        "llava": "line 4 of a.jsonl",
        "llava-json": "record 3 of a.json",
        "sharegpt": "line 4 of a.jsonl",
        "messages": "line 4 of a.jsonl",
        "webdataset": "sample 3 of a.tar",
    }
    for name, place in places.items():
        source = CHAT_FORMATS[name](tmp_path, [good, good, bad])
        if place.startswith("line"):
            lines = source.file.read_text().splitlines()
            source = type(source)(str(source.file))
            source.file.write_text("\n".join([lines[0], "", *lines[1:]]))
        with pytest.raises(DataError, match=rf"\({place}\)$"):
            source[2]
    with pytest.raises(DataError, match=r"\(row 2 of a.parquet\)$"):
        parquet(tmp_path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}])[1]
    (tmp_path / "b.csv").write_text('image,caption\na.png,"two\nlines"\n,x\n')
    with pytest.raises(DataError, match=r"\(line 4 of b.csv\)$"):
        Captions(str(tmp_path / "b.csv"))[1]


def test_a_shard_whose_column_is_null_is_read_with_the_others(tmp_path):
    shown = pa.table({"images": [[{"bytes": png(1), "path": None}]], "messages": [FLAT]})
    none = pa.table({"images": pa.nulls(1), "messages": [[user("Hi"), assistant("Ho.")]]})
    for first, second in ((shown, none), (none, shown)):
        for number, rows in enumerate((first, second)):
            pq.write_table(rows, tmp_path / f"p-{number}.parquet")
            with pa.ipc.new_stream(str(tmp_path / f"p-{number}.arrow"), rows.schema) as writer:
                writer.write_table(rows)
        for suffix in ("parquet", "arrow"):
            source = Parquet(str(tmp_path / f"p-*.{suffix}"), cache_dir=str(tmp_path / "cache"))
            assert sorted(len(source[n].images) for n in range(2)) == [0, 1]
            assert len(source[0].images) == (first is shown)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {
                "image_1": [{"bytes": png(1), "path": ""}],
                "image_2": [{"bytes": png(2), "path": ""}],
            },
            {},
            "image_1, image_2",
        ),
        ({"scan": [{"bytes": png(1), "path": ""}]}, {}, "the columns scan with pictures"),
        ({"image": ["a.png"], "image_2": ["b.png"]}, {}, "the columns image_2 with pictures"),
        (
            {"image": ["a.png"], "images": [["b.png"]]},
            {},
            "has 'image' and 'images', expected one of them",
        ),
        ({"image": ["a.png"], "image_2": ["b.png"]}, {"image_column": "image"}, None),
        ({"image": ["a.png"], "thumbnail": [{"bytes": png(2), "path": ""}]}, {}, None),
    ],
)
def test_of_several_columns_of_pictures_the_source_or_the_name_decides(
    tmp_path, columns, options, message
):
    pq.write_table(pa.table({"messages": [FLAT], **columns}), tmp_path / "a.parquet")
    source = Parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"), **options)
    if message is None:
        assert source[0].images == ["a.png"]
        assert [note.text for note in source[0].notes] == [
            f"the column '{name}'" for name in columns if name != "image"
        ]
        return
    with pytest.raises(DataError, match=message):
        source[0]


PICTURE_KEYS = [
    "image_filename",
    "image_file_name",
    "imgname",
    "imagePath",
    "image_base64",
    "imageUrl",
    "picture_uri",
    "photo_b64",
]


@pytest.mark.parametrize("key", PICTURE_KEYS)
@every_format
def test_a_picture_under_a_name_that_is_not_read_is_refused(tmp_path, read, key):
    with pytest.raises(DataError, match=f"{key}.*(is|are) not read"):
        read(tmp_path, [{"question": "?", "answer": "!", key: "a.png"}])[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("file_name", "train/a.PNG"), ("frames", ["1.jpg", "2.jpg"]), ("src", "clip.mp4")],
)
def test_a_value_that_names_a_picture_is_refused_where_none_is_shown(tmp_path, key, value):
    record = {"question": "?", "answer": "!", key: value}
    with pytest.raises(DataError, match=f"has '{key}': .*which is not read, and no picture"):
        CHAT_FORMATS["llava"](tmp_path, [record])[0]
    assert CHAT_FORMATS["llava"](tmp_path, [{**record, "image": "b.png"}])[0].images == ["b.png"]


@pytest.mark.parametrize("key", ["source", "file_name", "split"])
def test_a_value_that_names_no_picture_is_noted(tmp_path, key):
    record = {"question": "?", "answer": "!", key: "report.pdf"}
    sample = CHAT_FORMATS["llava"](tmp_path, [record])[0]
    assert Note("unused", f"a record's '{key}'") in sample.notes


@pytest.mark.parametrize("key", ["image_path", "img", "photo_url", "shot"])
def test_a_picture_that_a_turn_names_otherwise_is_refused(tmp_path, key):
    for turn in ({**user("What?"), key: "a.png"}, {"user": "?", "assistant": "!", key: "a.png"}):
        turns = [turn, assistant("x")] if "role" in turn else [turn]
        with pytest.raises(DataError, match=rf"a turn has '{key}': .*\(turn 1\)"):
            CHAT_FORMATS["messages"](tmp_path, [{"messages": turns}])[0]


@pytest.mark.parametrize("key", ["image_id", "imageId", "img_ids", "video_id"])
@every_format
def test_the_number_of_a_picture_that_is_not_there_is_refused(tmp_path, read, key):
    record = {"question": "?", "answer": "!", key: 458752}
    with pytest.raises(DataError, match=f"{key}.*(no picture or video|are not read)"):
        read(tmp_path, [record])[0]
    assert read(tmp_path, [{**record, "image": "a.png"}])[0].images == ["a.png"]


@pytest.mark.parametrize("key", ["video_start", "end", "clip"])
@every_format
def test_a_piece_of_a_records_video_is_refused(tmp_path, read, key):
    record = {"question": "<video>?", "answer": "!", "video": "a.mp4", key: 3.0}
    with pytest.raises(DataError, match=f"'{key}'.*shown whole"):
        read(tmp_path, [record])[0]


@pytest.mark.parametrize("key", ["video_start", "end"])
def test_a_piece_of_a_captioned_video_of_a_tar_is_refused(tmp_path, key):
    record = {"caption": "a dog", key: 3.0}
    write_tar(tmp_path / "a.tar", [("0.mp4", b"video"), ("0.json", record)])
    with pytest.raises(DataError, match=f"'{key}'.*shown whole"):
        WebDataset(str(tmp_path / "a.tar"))[0]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@every_format
def test_a_thought_beside_question_and_answer_is_the_answers(tmp_path, read, key):
    record = {"prompt": "p", "response": "r", key: "because"}
    sample = read(tmp_path, [record])[0]
    assert sample.messages[1]["reasoning_content"] == "because"
    assert not sample.notes


def test_alpaca_refuses_a_thought(tmp_path):
    record = {"instruction": "a", "output": "b", "reasoning_content": "because"}
    with pytest.raises(DataError, match="has 'reasoning_content'"):
        json_lines(Alpaca)(tmp_path, [record])[0]


@every_format
def test_an_answer_beside_a_chat_that_ends_with_a_question_is_refused(tmp_path, read):
    turns = [user("1"), assistant("2"), user("3")]
    with pytest.raises(DataError, match="has 'response' beside 'messages', which ends with a"):
        read(tmp_path, [{"messages": turns, "response": "4"}])[0]


PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]


@every_format
def test_parts_that_are_stored_as_json_are_parts(tmp_path, read):
    boxes = '[{"bbox": [1, 2, 3, 4], "label": "cat"}]'
    turns = [user(json.dumps(PARTS)), assistant(boxes)]
    sample = read(tmp_path, [{"messages": turns}])[0]
    assert [said(message) for message in sample.messages] == [
        ("user", "[image]What?"),
        ("assistant", boxes),
    ]
    assert sample.images == ["a.png"]


@pytest.mark.parametrize("answers", ['["yes", "no", "yes"]', "['yes', 'no', 'yes']"])
@every_format
def test_a_list_of_answers_that_is_stored_as_a_text_is_a_list(tmp_path, read, answers):
    sample = read(tmp_path, [{"question": "?", "answers": answers}])[0]
    assert said(sample.messages[1]) == ("assistant", "yes")
    assert sample.metadata["accepted"] == ["yes", "no"]
    # a box, which is one answer
    sample = read(tmp_path, [{"question": "?", "answers": "[1, 2]"}])[0]
    assert said(sample.messages[1]) == ("assistant", "[1, 2]")


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets before 5")
def test_values_of_several_types_that_datasets_stores_as_json_are_what_they_were(tmp_path):
    records = [
        {"messages": [user(PARTS), assistant('a "red" cat')]},
        {"messages": [user("And?"), assistant("42")]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "in.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    table.to_parquet(str(tmp_path / "a.parquet"))
    expected = json_lines(Messages)(tmp_path, records)
    source = Parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    for number in range(2):
        assert list(map(said, source[number].messages)) == list(
            map(said, expected[number].messages)
        )
        assert source[number].images == expected[number].images


@pytest.mark.parametrize("mark", ["<image_placeholder>", "<image_1>", "<start_of_image>"])
def test_another_projects_mark_in_a_turn_with_pictures_is_refused(tmp_path, mark):
    turn = {**user(f"A: {mark} B: {mark} which?"), "images": ["a.png", "b.png"]}
    with pytest.raises(DataError, match=f"has 2 pictures .*and {mark} in its text"):
        CHAT_FORMATS["messages"](tmp_path, [{"messages": [turn, assistant("B")]}])[0]


def test_pictures_of_a_turn_that_has_no_marks_are_counted(tmp_path):
    turns = [{**user("Look"), "images": ["a.png"]}, assistant("B")]
    sample = CHAT_FORMATS["messages"](tmp_path, [{"messages": turns}])[0]
    assert [note.kind for note in sample.notes] == ["assumed"]
    turns[0]["content"] = "<image>Look"
    assert not CHAT_FORMATS["messages"](tmp_path, [{"messages": turns}])[0].notes


@pytest.mark.parametrize("mark", ["<image_1>", "<|vision_start|><|image_pad|>", "[img]"])
def test_another_projects_mark_without_any_picture_is_noted(tmp_path, mark):
    record = {"messages": [user(f"{mark} what?"), assistant("B")]}
    notes = CHAT_FORMATS["messages"](tmp_path, [record])[0].notes
    assert [note.kind for note in notes] == ["assumed"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Translate:", "query": "Hello", "response": "Hallo"}, "has 'query' beside"),
        ({"question": "?", "answer": "42", "response": "So, 42."}, "has 'response' beside"),
        ({"question": "?", "prompt": "In a word.", "answer": "42"}, "has 'prompt' beside"),
        (
            {"messages": [user("Hi"), assistant("Ho.")], "history": [["a", "b"]]},
            "has 'history' beside 'messages'; write it as turns",
        ),
        (
            {"texts": [{"question": "?", "answer": "b", "options": ["a", "b"]}]},
            "a turn has 'options' beside 'question'",
        ),
    ],
)
@every_format
def test_a_further_question_or_answer_is_refused(tmp_path, read, record, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [record])[0]


@every_format
@pytest.mark.parametrize("verdict", [True, False])
def test_a_judgement_of_an_answer_is_refused_whichever_it_is(tmp_path, read, verdict):
    record = {"messages": [user("Hi"), assistant("bad")], "kto_tag": verdict}
    with pytest.raises(DataError, match=f"'kto_tag': {verdict}, a judgement of the answer"):
        read(tmp_path, [record])[0]


@every_format
def test_records_with_an_empty_id_go_by_their_place(tmp_path, read):
    records = [{"id": "", "question": f"{n}?", "answer": "!"} for n in range(3)]
    source = read(tmp_path, records)
    assert len({source[n].id for n in range(3)}) == 3
    assert len({identity for _, identity in source.ids(range(3))}) == 3


def test_an_input_without_an_instruction_is_the_question(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "", "input": "Hello", "output": "Ho."}])
    )
    sample = Alpaca(str(tmp_path / "a.json"))[0]
    assert sample.messages[0]["content"] == [{"type": "text", "text": "Hello"}]


def test_the_escaped_word_image_beside_an_unmarked_picture_is_a_word(tmp_path):
    record = {"image": "a.png", "messages": [{"role": "user", "content": r"Who wrote \<image>?"}]}
    record["messages"].append({"role": "assistant", "content": "I."})
    (tmp_path / "escaped.jsonl").write_text(json.dumps(record) + "\n")
    [sample] = Messages(str(tmp_path / "escaped.jsonl"))
    assert sample.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "\nWho wrote <image>?"},
    ]
