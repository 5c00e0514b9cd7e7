"""Files become samples; files and records that are wrong are named."""

import json

import pytest
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.media.images import open_image

RECORD = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A dog."},
    ],
    "kinds": ["x"],
}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_llava_records_become_chats_with_every_character_kept(tmp_path):
    sample = LLaVA(write(tmp_path / "a.json", [RECORD]))[0]
    assert sample.id == "a:7"
    assert sample.images == ["a.png"]
    assert sample.messages[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}],
    }
    assert sample.messages[1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "A dog."}],
    }
    assert sample.metadata == {"kinds": ["x"]}


def test_json_and_jsonl_hold_the_same(tmp_path):
    records = [RECORD, {**RECORD, "id": "8"}]
    lines = "\n".join(json.dumps(record) for record in records) + "\n\n"
    one, other = (
        LLaVA(write(tmp_path / "a.json", records)),
        LLaVA(write(tmp_path / "a.jsonl", lines)),
    )
    assert len(one) == len(other) == 2
    assert [one[i] for i in range(2)] == [other[i] for i in range(2)]


def test_alpaca_puts_the_input_on_a_line_of_its_own(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 + 2", "output": "3", "kind": "k"},
        {"instruction": "Hi", "output": "Ho"},
    ]
    source = Alpaca(write(tmp_path / "a.json", records))
    assert [source[i].messages[0]["content"][0]["text"] for i in range(2)] == ["Add.\n1 + 2", "Hi"]
    assert source[0].metadata == {"kind": "k"}


def test_alpaca_records_can_be_turns_of_one_chat_and_none_is_lost(tmp_path):
    records = [{"instruction": str(i), "output": str(-i)} for i in range(7)]
    source = Alpaca(write(tmp_path / "a.json", records), records_per_chat=3)
    assert len(source) == 3
    said = [m["content"][0]["text"] for i in range(3) for m in source[i].messages]
    assert said == [text for i in range(7) for text in (str(i), str(-i))]


def test_alpaca_turns_keep_their_kinds_and_have_no_accepted_answers_in_common(tmp_path):
    records = [
        {"instruction": "a", "output": "b", "kind": "geo"},
        {"instruction": "c", "output": "d"},
    ]
    source = Alpaca(write(tmp_path / "a.json", records), records_per_chat=2)
    assert source[0].metadata == {"kinds": ["geo", ""]}
    records[1]["accepted"] = ["d", "e"]
    source = Alpaca(write(tmp_path / "b.json", records), records_per_chat=2)
    with pytest.raises(
        DataError, match="'accepted', which is of one question: set records_per_chat"
    ):
        source[0]


def test_llava_records_with_videos_have_video_parts_in_order(tmp_path):
    turns = [
        {"from": "human", "value": "<video> or <image>\n?"},
        {"from": "gpt", "value": "A dog."},
    ]
    record = {**RECORD, "conversations": turns, "video": "v.mp4"}
    sample = LLaVA(write(tmp_path / "a.json", [record]))[0]
    assert (sample.images, sample.videos) == (["a.png"], ["v.mp4"])
    assert [part["type"] for part in sample.messages[0]["content"]] == [
        "video",
        "text",
        "image",
        "text",
    ]
    assert "".join(part.get("text", "") for part in sample.messages[0]["content"]) == " or \n?"
    assert sample.metadata == {"kinds": ["x"]}


def test_without_a_video_the_word_is_text_where_it_is_escaped_or_an_answer_has_it(tmp_path):
    turns = [
        {"from": "human", "value": "What is \\<video>?"},
        {"from": "gpt", "value": "A <video> tag."},
    ]
    sample = LLaVA(write(tmp_path / "a.json", [{"id": "7", "conversations": turns}]))[0]
    assert sample.messages[0]["content"] == [{"type": "text", "text": "What is <video>?"}]
    assert sample.messages[1]["content"] == [{"type": "text", "text": "A <video> tag."}]
    assert sample.videos == []
    turns[0]["value"] = "What is <video>?"
    with pytest.raises(
        DataError,
        match=r"sample b:7 has 1 <video> placeholders and 0 videos: name a file in .*, or write \\<video>",
    ):
        LLaVA(write(tmp_path / "b.json", [{"id": "7", "conversations": turns}]))[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[{"id": 1,]', "a.json: line 1: not JSON"),
        ({"id": 1}, "a.json: holds a dict, expected a list of records"),
        ([], "a.json: holds no record"),
        (["text"], "a: a record is a str, expected an object .record 1 of a.json"),
        ([{"id": "7"}], "sample a:7 has no 'conversations'; it has id"),
        (
            [{**RECORD, "conversations": "hi"}],
            "sample a:7: 'conversations' is a str, expected list",
        ),
        (
            [{**RECORD, "conversations": [{"from": "robot", "value": "x"}]}],
            "sample a:7: a turn is .*robot.*expected from",
        ),
        ([{**RECORD, "conversations": [{"from": "gpt"}]}], "sample a:7: a turn is"),
        ([{**RECORD, "image": 3}], "sample a:7: 'image' is 3, expected a path or a list of paths"),
        (
            [{**RECORD, "video": [3]}],
            "sample a:7: 'video' is 3, expected a path or a list of paths",
        ),
    ],
)
def test_a_wrong_file_or_record_is_named(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        LLaVA(write(tmp_path / "a.json", value))[0]


def test_a_missing_file_and_a_wrong_encoding_are_named(tmp_path):
    with pytest.raises(DataError, match="b.json: no such file"):
        len(LLaVA(str(tmp_path / "b.json")))
    (tmp_path / "c.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match="c.json: not UTF-8 at byte 2"):
        len(LLaVA(str(tmp_path / "c.json")))


def test_a_broken_line_of_jsonl_is_told_by_its_number_and_spares_the_others(tmp_path):
    source = LLaVA(
        write(tmp_path / "a.jsonl", json.dumps(RECORD) + "\n\n{broken\n" + json.dumps(RECORD))
    )
    assert [len(source), source[0].id, source[2].id] == [3, "a:7", "a:7"]
    with pytest.raises(DataError, match="a.jsonl: line 3: not JSON"):
        source[1]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(folder / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "text.png").write_text("no picture")
    Image.effect_noise((20, 10), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:120])
    return folder


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../outside.png", "leaves the image root"),
        ("/etc/hostname", "leaves the image root"),
        ("link.png", "leaves the image root"),
        ("none.png", "sample s:1: no image none.png in"),
        ("text.png", "sample s:1: image text.png cannot be read"),
        ("cut.png", "sample s:1: image cut.png cannot be read"),
        (".", "sample s:1: image . cannot be read"),
    ],
)
def test_a_picture_that_cannot_or_must_not_be_opened_is_named(root, path, message):
    with pytest.raises(DataError, match=message):
        open_image(root, path, "s:1", max_pixels=1000)


def test_a_picture_over_the_pixel_limit_is_refused_before_it_is_decoded(root, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="image a.png has 200 pixels, over the limit of 199"):
        open_image(root, "a.png", "s:1", max_pixels=199)


def test_pictures_become_upright_rgb_with_transparency_on_white(root):
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(root / "clear.png")
    opened = open_image(root, "clear.png", "s", 1000)
    assert opened.mode == "RGB"
    assert [opened.getpixel(p) for p in ((0, 0), (1, 1))] == [(0, 0, 255), (255, 255, 255)]
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)
    assert open_image(root, "turned.jpg", "s", 1000).size == (10, 20)
    Image.new("CMYK", (3, 3)).save(root / "cmyk.jpg")
    assert open_image(root, "cmyk.jpg", "s", 1000).mode == "RGB"
