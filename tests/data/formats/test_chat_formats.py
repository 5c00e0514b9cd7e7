"""ShareGPT, messages and captions: every spelling of the same chat gives the same sample; what
is wrong is named."""

import base64
import csv
import importlib
import inspect
import io
import json
import pickle
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.sharegpt import ShareGPT
from owlfuse.data.formats.turn_keys import ROLES

SOURCES = sorted(
    (Path(__file__).resolve().parents[3] / "configs" / "data" / "source").glob("*.yaml")
)
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]


def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(file, "PNG")
    return file.getvalue()


PNG = png()
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def read(tmp_path, kind, *records, name="a.jsonl", **options):
    (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    source = kind(str(tmp_path / name), **options)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_yaml_names_every_argument_and_its_source_is_named_when_its_file_is_missing(
    path, tmp_path
):
    config = yaml.safe_load(path.read_text())
    module, kind = config.pop("_target_").rsplit(".", 1)
    kind = getattr(importlib.import_module(module), kind)
    assert config.pop("file") == "???"
    defaults = {
        name: p.default for name, p in inspect.signature(kind).parameters.items() if name != "file"
    }
    if path.stem == "alpaca":
        defaults.pop("image_root")
    assert {key: value or None for key, value in config.items()} == {
        key: value or None for key, value in defaults.items()
    }
    source = kind(file=str(tmp_path / "none.tar"), **config)
    with pytest.raises(DataError, match=r"none\.tar: no such file"):
        len(source)
    assert vars(pickle.loads(pickle.dumps(source))) == vars(source)


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A dog."},
            ],
            "image": "a.png",
        },
        {
            "conversation": [
                {"from": "user", "value": "<image>\nWhat?"},
                {"from": "model", "value": "A dog."},
            ],
            "images": ["a.png"],
        },
        {
            "conversations": [
                {"role": "Human", "content": "<image>\nWhat?", "from": None},
                {"role": "assistant", "content": "A dog."},
            ],
            "images": [{"bytes": None, "path": "a.png"}],
            "image": None,
            "system": "",
        },
    ],
)
def test_sharegpt_in_every_spelling_is_the_same_chat(tmp_path, record):
    (sample,) = read(tmp_path, ShareGPT, {"id": 7, **record, "lang": "en"})
    assert (sample.id, sample.source, sample.images, sample.metadata) == (
        "a:7",
        "a",
        ["a.png"],
        {"lang": "en"},
    )
    assert sample.messages == CHAT


def test_sharegpt_takes_a_system_text_beside_the_turns_or_as_a_turn(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Ho"}]
    beside, among = read(
        tmp_path,
        ShareGPT,
        {"conversations": turns, "system": "Be kind."},
        {"conversations": [{"from": "system", "value": "Be kind."}, *turns]},
    )
    assert beside.messages == among.messages
    assert beside.messages[0] == {
        "role": "system",
        "content": [{"type": "text", "text": "Be kind."}],
    }
    assert [beside.id, among.id] == ["a:0", "a:1"]
    for role in ("system", "System", "system-prompt"):
        record = {"conversations": [{"from": role, "value": "x"}, *turns], "system": "y"}
        with pytest.raises(DataError, match="sample a:0 has a 'system' and a system turn"):
            read(tmp_path, ShareGPT, record)


def test_every_role_name_is_one_of_four():
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image_url", "image_url": {"url": URI}}, PNG),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "high"}, "text": None}, PNG),
        ({"type": "image_url", "image_url": URI}, PNG),
        ({"type": "input_image", "image_url": URI}, PNG),
        ({"type": "image", "url": URI}, PNG),
        ({"type": "image", "base64": base64.b64encode(PNG).decode()}, PNG),
        ({"type": "image", "image": "data:image/png," + quote(PNG)}, PNG),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "b/a.png", "image": None}, "b/a.png"),
        ({"type": "image", "url": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
    ],
)
def test_an_image_part_of_openai_or_hugging_face_is_a_path_or_bytes(tmp_path, part, image):
    turns = [
        {"role": "user", "content": [part, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": "A dog."},
    ]
    (sample,) = read(tmp_path, Messages, {"messages": turns, "topic": "dogs"})
    assert sample.images == [image]
    assert sample.messages == CHAT
    assert sample.metadata == {"topic": "dogs"}


def test_video_parts_take_the_videos_of_their_index_too(tmp_path):
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "video", "index": 1},
                {"type": "video", "index": 0},
                {"type": "text", "text": "Which is longer?"},
            ],
        },
        {"role": "assistant", "content": "The first."},
    ]
    (sample,) = read(tmp_path, Messages, {"messages": chat, "videos": ["a.mp4", "b.mp4"]})
    assert sample.videos == ["b.mp4", "a.mp4"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "index": "1"}, "a part's 'index' is '1', expected a whole number"),
        ({"type": "text", "text": "a", "image": "a.png"}, "a text part has 'image'"),
        ({"type": "image", "image": "a.png", "text": "a"}, "give the text a part of its own"),
        ({"type": "image", "image": "a.png", "url": "b.png"}, "has 'image' and 'url'"),
    ],
    ids=str,
)
def test_what_a_part_would_lose_is_refused(tmp_path, part, message):
    chat = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]
    with pytest.raises(DataError, match=message):
        read(tmp_path, Messages, {"messages": chat, "images": ["a.png", "b.png"]})


def test_image_parts_without_a_picture_show_the_records_in_order_or_by_their_index(tmp_path):
    text = {"type": "text", "text": "?", "index": None}
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "!"}]}

    def record(*parts, **more):
        return {"messages": [{"role": "user", "content": [*parts, text]}, answer], **more}

    plain, by_index, own, placeholder = read(
        tmp_path,
        Messages,
        record({"type": "image"}, {"type": "image"}, images=["a", "b"]),
        record({"type": "image", "index": 1}, {"type": "image", "index": 0}, images=["a", "b"]),
        record({"type": "image"}, {"type": "image", "path": "c"}, images=["a"]),
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": [URI]},
    )
    assert [plain.images, by_index.images, own.images, placeholder.images] == [
        ["a", "b"],
        ["b", "a"],
        ["a", "c"],
        [PNG],
    ]
    assert plain.messages == by_index.messages == own.messages
    assert plain.messages[0]["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]


def test_videos_are_paths_shown_by_placeholders_or_parts(tmp_path):
    said = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "!"}]
    part = {"type": "video", "video": "a.mp4"}
    parts = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, said[1]]
    escaped = [{"role": "user", "content": "\\<video>?"}, said[1]]
    records = {"messages": said, "video": "a.mp4"}, {"messages": parts}, {"messages": escaped}
    beside, own, text = read(tmp_path, Messages, *records)
    assert beside.videos == own.videos == ["a.mp4"]
    assert beside.messages == own.messages
    assert beside.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "?"}]
    assert (text.videos, text.messages[0]["content"]) == (
        [],
        [{"type": "text", "text": "<video>?"}],
    )
    chat = [{"from": "human", "value": "<image><video>?"}, {"from": "gpt", "value": "!"}]
    for kind in (LLaVA, ShareGPT):
        (sample,) = read(
            tmp_path, kind, {"conversations": chat, "videos": ["a.mp4"], "image": "a.png", "k": 1}
        )
        assert (sample.images, sample.videos, sample.metadata) == (["a.png"], ["a.mp4"], {"k": 1})
        assert [part["type"] for part in sample.messages[0]["content"]] == [
            "image",
            "video",
            "text",
        ]


def user(*content, **more):
    return {"messages": [{"role": "user", "content": list(content)}], **more}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 3}, "sample a:3 has no 'messages'; it has id"),
        ({"messages": {}}, "sample a:0: 'messages' is a dict, expected list"),
        ({"messages": ["hi\nho"]}, "sample a:0: a turn is hi ho, expected from or role"),
        (
            {"messages": [{"role": "toll", "content": "x"}]},
            "a turn is .*toll.*, expected from or role",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            "a turn is .*None",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "a turn is"),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
            "a turn has 'weight': 0.5, expected 1 or true, 0 or",
        ),
        (user("text"), "a part is text, expected a text with its text, an image or a video"),
        (user({"type": "audio"}), "a part is .*audio.*, expected a text"),
        (user({"type": "text"}), "a part is .*, expected a text"),
        (user({"type": "image_url"}), "a part is .*, expected an image_url"),
        (
            user({"type": "image", "url": "https://x.org/a.png"}),
            "image https://x.org/a.png is a URL; fetch it",
        ),
        (
            user({"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}),
            "image http://x.org/a.png is a URL",
        ),
        (
            user({"type": "image", "path": "file:///etc/passwd"}),
            "image file:///etc/passwd is a URL",
        ),
        (user({"type": "image", "path": ""}), "'image' is empty, expected a path"),
        (user({"type": "image", "image": 3}), "'image' is 3, expected a path"),
        (user({"type": "image", "image": {"a": 1}}), "'image' is .*, expected a path"),
        (
            user({"type": "image", "image": "data:image/png;base64,@@@"}),
            "data: URI .* is not base64",
        ),
        (
            user({"type": "image", "image": "data:image/png;base64,"}),
            "data: URI data:image/png;base64, holds no data",
        ),
        (
            user({"type": "image", "image": "data:image/png"}),
            "data: URI data:image/png holds no data",
        ),
        (
            user({"type": "image", "index": 1}, images=["a"]),
            "an image part has index 1, and there are 1 images",
        ),
        (
            user({"type": "image"}, {"type": "image", "path": "a"}),
            "more image parts without a file than its 0 images",
        ),
        (
            user({"type": "image", "path": "a"}, images=["b"]),
            "has 1 image parts and 1 images that none of them shows",
        ),
        (user(video="a", videos=["b"]), "has 'video' and 'videos', expected one of them"),
        (user(video=[3]), r"'video' is 3, expected a path"),
        (user(video=3), "'video' is 3, expected a path"),
        (user({"type": "video", "url": "https://x.org/a.mp4"}), "a.mp4 is a URL"),
        (
            user({"type": "video", "path": "a"}, {"type": "video"}),
            "more video parts without a file than its 0 videos",
        ),
        (user(image="a", images=["b"]), "has 'image' and 'images', expected one of them"),
        (user(images=["a", 1]), "'images' is 1, expected a path"),
        (user(images=["http://x.org/a.png"]), "image http://x.org/a.png is a URL"),
    ],
)
def test_what_is_wrong_in_a_chat_is_named(tmp_path, record, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, Messages, record)
    assert "\n" not in str(error.value)
    assert "sample a:" in str(error.value)


PAIRS = [
    {"id": f"{i:03d}", "image": f"{i}.png", "caption": f'He said "{i}", then'} for i in range(40)
]


def write_pairs(path):
    if path.suffix == ".json":
        path.write_text(json.dumps(PAIRS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(
                file, list(PAIRS[0]), delimiter="," if path.suffix == ".csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(PAIRS)
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_caption_pairs_are_the_same_from_every_kind_of_file(tmp_path, suffix):
    source = Captions(write_pairs(tmp_path / f"a.{suffix}"))
    assert len(source) == 40
    sample = source[7]
    assert (sample.id, sample.images) == ("a:007", ["7.png"])
    assert sample.messages == [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": 'He said "7", then'}]},
    ]


def test_an_instruction_is_chosen_by_the_id_alone_and_all_are_used(tmp_path):
    def asked(name, records, **options):
        (tmp_path / name).write_text(json.dumps(records))
        source = Captions(str(tmp_path / name), **options)
        source.name = name
        samples = [source[i] for i in range(len(source))]
        return {s.id.partition(":")[2]: s.messages[0]["content"][1]["text"] for s in samples}

    instructions = ["Say what you see.", "Describe it.", "What is it?"]
    one = asked("one.json", PAIRS, instructions=instructions)
    assert set(one.values()) == {f"\n{text}" for text in instructions}
    assert asked("other.json", PAIRS[::-1], instructions=instructions) == one


def test_a_csv_field_may_hold_newlines_and_other_columns_are_metadata(tmp_path):
    (tmp_path / "a.csv").write_text(
        'url,text,score\r\nb.png,"two\nlines, and ""quotes""",0.5\r\n\r\nc.png,one,\r\n'
    )
    source = Captions(str(tmp_path / "a.csv"), image_field="url", caption_field="text")
    samples = [source[i] for i in range(len(source))]
    assert [s.messages[1]["content"][0]["text"] for s in samples] == [
        'two\nlines, and "quotes"',
        "one",
    ]
    assert [s.metadata for s in samples] == [{"score": "0.5"}, {"score": ""}]
    assert [s.images for s in samples] == [["b.png"], ["c.png"]]


@pytest.mark.parametrize("text", ["5' 6\" tall", '"Go" he said', '"', "", 'a "b', " spaces kept "])
def test_a_tsv_row_is_a_line_whatever_its_quotes(tmp_path, text):
    (tmp_path / "a.tsv").write_text(f"image\tcaption\nb.png\t{text}\nc.png\tone\n")
    source = Captions(str(tmp_path / "a.tsv"))
    assert [source[i].messages[1]["content"][0]["text"] for i in range(len(source))] == [
        text,
        "one",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,text\nb,c\n", "a.csv has no column 'caption'; its header has image, text"),
        ("a.csv", "", "a.csv: holds no record, not even a header"),
        ("a.csv", "image,caption\n", "a.csv: holds no record"),
        (
            "a.csv",
            "image,caption\nb,c,d\n",
            "a.csv: line 2, which begins 'b', has 3 fields, the header has 2",
        ),
        (
            "a.tsv",
            "image\tcaption\nb\n",
            "a.tsv: line 2, which begins 'b', has 1 fields, the header has 2",
        ),
        (
            "a.csv",
            'image,caption\nb,c"\nd,e\n',
            "a.csv: line 2 is 2 rows: a double quote opens and is not closed",
        ),
        ("a.csv", 'image,caption\nb,"c\nd,e\n', "a.csv: line 2 is not CSV: unexpected end of data"),
        ("a.csv", "image,caption\n,c\n", "sample a:0: 'image' is empty"),
        ("a.csv", "image,caption\nhttps://x.org/b.png,c\n", "image https://x.org/b.png is a URL"),
        ("a.json", '[{"image": "b"}]', "sample a:0 has no 'caption'; it has image"),
        ("a.json", '[{"caption": "b"}]', "sample a:0 has no 'image'; it has caption"),
        (
            "a.json",
            '[{"image": "b", "caption": ["c"]}]',
            "sample a:0: 'caption' is a list, expected str",
        ),
    ],
)
def test_wrong_caption_pairs_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Captions(str(tmp_path / name))[0]


def test_a_row_that_is_not_utf8_is_an_error_of_its_own(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"image,caption\nb,\xe9\nc,d\n")
    source = Captions(str(tmp_path / "a.csv"))
    assert source[1].images == ["c"]
    with pytest.raises(DataError, match="a.csv: line 2: not UTF-8 at byte 2"):
        source[0]
