"""Files are read by what they hold: lists, lists in an object, and lines, whatever their ending;
and mPLUG-Owl1's texts."""

import io
import json
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from owlfuse.core.errors import DataError
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.parquet import Parquet
from owlfuse.data.formats.sharegpt import ShareGPT
from owlfuse.data.formats.webdataset import WebDataset
from owlfuse.data.readers import lines


def chat(letter):
    turns = [
        {"role": "user", "content": f"{letter}?"},
        {"role": "assistant", "content": f"{letter}!"},
    ]
    return {"id": f"r{letter}", "messages": turns}


CHATS = [chat(letter) for letter in "abc"]
PAIRS = [{"id": f"r{n}", "image": f"{n}.png", "caption": f"{n}!"} for n in "abc"]
KINDS = {LLaVA: CHATS, Messages: CHATS, ShareGPT: CHATS, Captions: PAIRS}
OPENING = (
    "The following is a conversation between a curious human and AI assistant. The assistant "
    "gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def as_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


SHAPES = {
    "a list": json.dumps,
    "an indented list": lambda records: "\n" + json.dumps(records, indent=1),
    "lines": as_lines,
    "an object": lambda records: json.dumps({"data": records}),
    "an object with more": lambda records: json.dumps(
        {"version": "1", "splits": ["x"], "data": records, "empty": []}, indent=1
    ),
}

FILES = [
    (shape, ending)
    for shape in SHAPES
    for ending in ("json", "jsonl")
    if ending == "json" or "object" not in shape
]
"""An object in a file that is named as lines is a record."""


@pytest.mark.parametrize("limit", [None, 300], ids=["whole", "streamed"])
@pytest.mark.parametrize(("shape", "ending"), FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_records_are_read_whatever_the_shape_and_ending_of_their_file(
    kind, shape, ending, limit, tmp_path, monkeypatch
):
    if limit:
        monkeypatch.setattr(lines, "MAX_RECORD", limit)
    file = tmp_path / f"a.{ending}"
    file.write_text(SHAPES[shape](KINDS[kind]))
    source = kind(file)
    samples = list(source)
    assert [sample.id for sample in samples] == ["a:ra", "a:rb", "a:rc"]
    assert [sample.messages[-1]["content"][0]["text"] for sample in samples] == ["a!", "b!", "c!"]
    unused = {note.text for note in samples[0].notes}
    expected = {f"the file's '{key}' beside its records" for key in ("version", "splits", "empty")}
    assert unused == (expected if shape == "an object with more" else set())


@pytest.mark.parametrize("limit", [None, 300], ids=["whole", "streamed"])
def test_several_lists_in_an_object_are_refused_with_their_names(limit, tmp_path, monkeypatch):
    if limit:
        monkeypatch.setattr(lines, "MAX_RECORD", limit)
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"train": CHATS, "info": {}, "val": CHATS}))
    with pytest.raises(
        DataError, match=r"a.json: holds lists of records under 'train', 'val', expected one"
    ):
        len(Messages(file))


def test_one_chat_that_is_a_file_is_a_record(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(CHATS[0], indent=1))
    assert [sample.id for sample in Messages(file)] == ["a:ra"]


def test_a_wrong_record_of_lines_named_json_is_told_by_its_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(CHATS[0]) + "\n\n{\n" + json.dumps(CHATS[1]) + "\n")
    source = Messages(file)
    assert (source[0].id, source[2].id) == ("a:ra", "a:rb")
    with pytest.raises(DataError, match="a.json: line 3: not JSON"):
        source[1]


def owl(text, images=("a.png",)):
    return {"image": list(images), "text": text, "task_type": "chat"}


OWL = (
    f"{OPENING}\nHuman: <image>\nHuman: What is it?\nIn one word: say.\nAI: A cat.\nHuman: "
    "Sure? AI: asks\nAI: Yes."
)
OWL_MESSAGES = [
    ("user", [{"type": "image"}, {"type": "text", "text": "\nWhat is it?\nIn one word: say."}]),
    ("assistant", [{"type": "text", "text": "A cat."}]),
    ("user", [{"type": "text", "text": "Sure? AI: asks"}]),
    ("assistant", [{"type": "text", "text": "Yes."}]),
]


def owl_files(folder, record):
    """The record in a file of each format."""
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist([record]), folder / "a.parquet")
    with tarfile.open(folder / "a.tar", "w") as tar:
        member = tarfile.TarInfo("r.json")
        member.size = len(json.dumps(record))
        tar.addfile(member, io.BytesIO(json.dumps(record).encode()))
    lined = [kind(folder / "a.jsonl") for kind in (LLaVA, Messages, ShareGPT)]
    return [
        *lined,
        Parquet(folder / "a.parquet", cache_dir=str(folder / "cache")),
        WebDataset(folder / "a.tar"),
    ]


def test_conversations_in_one_text_are_read_in_every_format(tmp_path):
    for source in owl_files(tmp_path, owl(OWL)):
        sample = source[0]
        assert [
            (message["role"], message["content"]) for message in sample.messages
        ] == OWL_MESSAGES
        assert sample.images == ["a.png"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Human: <image> Human: What? AI: A cat.", ["<image>", "\nWhat?", "A cat."]),
        (f"{OPENING} Human: <image> Human: What? AI: A cat.", ["<image>", "\nWhat?", "A cat."]),
        (
            "Be brief.\nHuman: <image>\nHuman: What?\nAI: A cat.",
            ["Be brief.", "<image>", "\nWhat?", "A cat."],
        ),
    ],
)
def test_conversations_in_one_line_or_with_another_opening(text, expected, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(owl(text)))
    messages = LLaVA(tmp_path / "a.jsonl")[0].messages
    assert [
        part.get("text", "<image>") for message in messages for part in message["content"]
    ] == expected
    assert [message["role"] for message in messages][-2:] == ["user", "assistant"]


def test_a_text_that_is_no_conversation_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(owl("A cat on a mat.")))
    with pytest.raises(
        DataError, match=r"sample a:0 has no 'conversations'; it has .*text.*line 1 of a.jsonl"
    ):
        LLaVA(tmp_path / "a.jsonl")[0]
