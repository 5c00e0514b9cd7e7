"""Bad input through the real DataModule, under both policies: one line that names it, or a skip
with a reason.

What is a fault of a file or of the configuration stops whatever the policy.
"""

import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bad_pictures import noise, write_odd, write_wrong
from owlfuse.core.errors import DataError
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.llava import LLaVA
from owlfuse.model.vision.backbone import Preprocessing

PREPROCESS = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")
RECORDS, PLACE = 8, 3
"""How many records a file has, and which of them is wrong."""


def turns(*said, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(said)]


def talk(*said, **changes):
    """A record without a picture."""
    return {"image": [], "conversations": turns(*said), **changes}


def roles(*names):
    return {"image": [], "conversations": [{"from": name, "value": "red"} for name in names]}


def deep(depth):
    value = "red"
    for _ in range(depth):
        value = [value]
    return value


# What the record is changed to (a dict: these fields; else the record itself), and what the error
# says.
RECORD_FAULTS = {
    "record-is-a-list": ([1, 2], "is a list, expected an object"),
    "record-is-a-number": (7, "is a int, expected an object"),
    "record-is-null": (None, "is a NoneType, expected an object"),
    "record-is-text": ("red", "is a str, expected an object"),
    "no-conversations": ({"conversations": ...}, "sample bad:r3 has no 'conversations'"),
    "conversations-null": ({"conversations": None}, "'conversations' is a NoneType, expected list"),
    "conversations-text": ({"conversations": "hi"}, "'conversations' is a str, expected list"),
    "conversations-object": (
        {"conversations": {"from": "human"}},
        "'conversations' is a dict, expected list",
    ),
    "empty-chat": ({"conversations": [], "image": []}, "sample bad:r3 has no messages"),
    "turn-is-text": ({"conversations": ["hi", "ho"]}, "a turn is hi, expected"),
    "turn-is-null": ({"conversations": [None]}, "a turn is None, expected"),
    "turn-nested-deep": ({"conversations": deep(200)}, "a turn is \\[\\[\\["),
    "turn-without-value": ({"conversations": [{"from": "human"}]}, "a turn is .*expected .*value"),
    "turn-without-role": ({"conversations": [{"value": "hi"}]}, "a turn is .*expected from"),
    "number-for-text": (talk("What?", 5), "a turn is .*5.*expected"),
    "null-for-text": (talk("What?", None), "a turn is .*None.*expected"),
    "unknown-role": (roles("human", "robot"), "a turn is .*robot.*expected from"),
    "role-is-a-number": (roles(1, 2), "a turn is .*1.*expected from"),
    "assistant-first": (
        roles("gpt", "human", "gpt"),
        "its first turn is the assistant's, expected the user's",
    ),
    "two-user-turns": (
        roles("human", "human", "gpt"),
        "turns 1 and 2 are both the user's, expected user and assistant in turn",
    ),
    "two-answers": (roles("human", "gpt", "gpt"), "turns 2 and 3 are both the assistant's"),
    "system-in-the-middle": (
        roles("human", "system", "gpt"),
        "turn 2 is a system message, expected at the start only",
    ),
    "two-system-messages": (
        roles("system", "system", "human", "gpt"),
        "turn 2 is a system message",
    ),
    "system-alone": (roles("system"), "no assistant turn"),
    "no-answer": (roles("human"), "no assistant turn"),
    "empty-answer": (talk("What?", ""), "turn 2 is an empty answer"),
    "blank-answer": (talk("What?", " \n\t\u00a0"), "turn 2 is an empty answer"),
    "second-answer-empty": (talk("What?", "red", "What?", " "), "turn 4 is an empty answer"),
    "too-many-placeholders": (
        {"conversations": turns("<image><image>\nWhat?", "red")},
        "2 <image> placeholders and 1 image",
    ),
    "mark-of-another-project": (
        {"conversations": turns("<image_1>\nWhat?", "red")},
        "and <image_1> in its text; write <image>",
    ),
    "more-images": ({"image": ["good.png", "good.png"]}, "1 <image> placeholders and 2 images"),
    "placeholder-without-image": ({"image": ...}, "1 <image> placeholders and 0 images"),
    "placeholder-in-an-answer": (
        {"conversations": turns("What?", "this <image>")},
        "an <image> in a turn of the assistant",
    ),
    "placeholder-in-a-system-message": (
        {"conversations": [{"from": "system", "value": "<image>"}, *turns("What?", "red")]},
        "an <image> in a turn of the system",
    ),
    "control-token-in-a-question": (
        talk("Say <|end|> now", "red"),
        r"the tokenizer's control token <\|end\|> in its text",
    ),
    "control-token-in-an-answer": (
        talk("What?", "red<|user|>"),
        r"the tokenizer's control token <\|user\|>",
    ),
    "control-token-in-a-system-message": (
        {
            "image": [],
            "conversations": [{"from": "system", "value": "<|pad|>"}, *turns("What?", "red")],
        },
        r"the tokenizer's control token <\|pad\|>",
    ),
    "nul": (talk("What\0?", "red"), "turn 1 holds the control character U\\+0000, expected text"),
    "escape-sequence": (
        talk("What?", "\x1b[31mred"),
        "turn 2 holds the control character U\\+001B",
    ),
    "backspace": (talk("What?", "red\x08"), "the control character U\\+0008"),
    "lone-surrogate": (talk("What \ud83d?", "red"), "turn 1 holds the lone surrogate U\\+D83D"),
    "lone-surrogate-in-an-answer": (
        talk("What?", "red \udc00"),
        "turn 2 holds the lone surrogate U\\+DC00",
    ),
    "huge-question": (
        talk("what is it? " * 9_000, "red"),
        "sample bad:r3 is [0-9]+ tokens long, over max_length of 512",
    ),
    "huge-answer": (talk("What?", "a" * 1_000_000), "tokens long, over max_length of 512"),
    "image-is-a-number": ({"image": 3}, "'image' is 3, expected a path"),
    "image-is-a-list-of-numbers": ({"image": [3]}, "'image' is .*3.*, expected a path"),
    "image-is-an-object": ({"image": {"file": "good.png"}}, "'image' is .*file.*, expected a path"),
}
PICTURE_FAULTS = {
    "missing-file": ("none.png", "no image none.png in"),
    "backslash": ("a\\none.png", r"no image a.none.png in .*divided by /"),
    "zero-bytes": ("empty.png", "image empty.png cannot be read: it is empty, expected a picture"),
    "truncated-jpeg": ("cut.jpg", "image cut.jpg cannot be read"),
    "truncated-png": ("cut.png", "image cut.png cannot be read"),
    "truncated-webp": ("cut.webp", "image cut.webp cannot be read"),
    "broken-png": ("broken.png", "image broken.png cannot be read"),
    "text-as-picture": ("text.png", "image text.png cannot be read: its 10 bytes are none of PNG"),
    "page-as-picture": ("page.jpg", "image page.jpg cannot be read: its"),
    "postscript": ("drawing.png", "image drawing.png cannot be read: its"),
    "decompression-bomb": ("bomb.png", "image bomb.png .*3600000000 pixels"),
    "over-the-pixel-limit": (
        "large.png",
        "image large.png has 1,001,000 pixels, over the limit of 1,000,000",
    ),
    "dots-leave-the-root": ("../outside.png", "image ../outside.png leaves the image root"),
    "link-leaves-the-root": ("link.png", "image link.png leaves the image root"),
    "linked-folder-leaves-the-root": ("up/outside.png", "leaves the image root"),
    "absolute-path": ("/etc/hostname", "image /etc/hostname leaves the image root"),
    "link-in-a-circle": ("loop.png", "image loop.png"),
    "link-to-nowhere": ("nowhere.png", "no image nowhere.png"),
    "url": ("https://example.org/a.png", "image https://example.org/a.png is a URL"),
    "file-url": ("file:///etc/hostname", "image file:///etc/hostname is a URL"),
    "folder-as-image": ("folder.png", "image folder.png cannot be read: it is a folder"),
    "root-as-image": (".", "image . cannot be read: it is a folder"),
    "pipe-as-image": ("pipe.png", "image pipe.png cannot be read: it is no ordinary file"),
    "unreadable-file": ("secret.png", "image secret.png cannot be read: Permission denied"),
    "nul-in-a-path": ("a\0.png", "cannot be read: embedded null"),
    "surrogate-in-a-path": ("a\ud800.png", "cannot be read: .*surrogates not allowed"),
    "newline-in-a-path": ("no\nne.png", r"no image no\\nne.png in"),
    "overlong-path": ("a" * 5000 + ".png", "cannot be read: File name too long"),
    "float-pixels": ("float.tiff", "its pixels are of 32 bits"),
    "int32-pixels": ("int32.tiff", "its pixels are of 32 bits"),
}
ALL = {
    **RECORD_FAULTS,
    **{name: ({"image": path}, message) for name, (path, message) in PICTURE_FAULTS.items()},
}


def good(number):
    return {
        "id": f"r{number}",
        "image": "good.png",
        "conversations": turns("<image>\nWhat color?", "red"),
    }


def changed(change):
    if not isinstance(change, dict):
        return change
    record = {**good(PLACE), **change}
    return {key: value for key, value in record.items() if value is not ...}


def module(shapes, source, **options):
    data = ChatData(
        str(shapes / "tokenizer"),
        {"bad": source},
        {},
        **{"global_batch_size": RECORDS, "workers": 0, "max_length": 512, **options},
    )
    data.bind(PREPROCESS, 2)
    return data


def only_batch(data):
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, max_steps=1, global_step=0)
    (batch,) = data.train_dataloader()
    return batch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad") / "pictures"
    path.mkdir()
    write_wrong(path)
    return path


@pytest.fixture(autouse=True)
def permission_denied(monkeypatch):
    """`secret.png` cannot be read, whoever runs the tests."""

    def refusing(opened):
        def refuse(path, *args, **kwargs):
            if Path(path).name == "secret.png":
                raise PermissionError(13, "Permission denied")
            return opened(path, *args, **kwargs)

        return refuse

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(os, "open", refusing(os.open))


def write_records(file, records):
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(file)


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_sample_is_told_in_one_line_or_skipped_with_its_reason(
    shapes, root, tmp_path, name
):
    change, message = ALL[name]
    records = [changed(change) if number == PLACE else good(number) for number in range(RECORDS)]
    file = write_records(tmp_path / "bad.jsonl", records)
    stopping = module(shapes, LLaVA(file, str(root), on_error="error"), max_pixels=1_000_000)
    with pytest.raises(DataError, match=message) as raised:
        only_batch(stopping)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700
    assert "bad" in str(raised.value)
    batch = only_batch(
        module(shapes, LLaVA(file, str(root), on_error="skip"), max_pixels=1_000_000)
    )
    assert sorted(batch.ids) == [f"bad:r{number}" for number in range(RECORDS) if number != PLACE]
    ((source, sample, reason),) = batch.skipped
    assert (source, sample) == ("bad", f"bad:{PLACE}")
    assert reason == str(raised.value)
    assert len(batch.pixel_values) == RECORDS - 1


def raw(*lines):
    return b"\n".join(lines) + b"\n"


GOOD_LINES = [json.dumps(good(number)).encode() for number in range(RECORDS)]
LINE_FAULTS = {
    "broken-json": b'{"id": "r3", "image": ',
    "two-values-in-a-line": GOOD_LINES[PLACE] + GOOD_LINES[PLACE],
    "wrong-encoding": GOOD_LINES[PLACE].replace(b"red", "é".encode("latin-1")),
    "utf-16": GOOD_LINES[PLACE].decode().encode("utf-16-le"),
    "nested-100000-deep": b"[" * 100_000 + b"]" * 100_000,
    "number-of-5000-digits": b'{"id": ' + b"9" * 5000 + b"}",
    "raw-control-character": GOOD_LINES[PLACE].replace(b"red", b"r\x01d"),
    "truncated-text": GOOD_LINES[PLACE][:-20],
}


@pytest.mark.parametrize("name", LINE_FAULTS)
def test_a_line_that_is_no_json_names_file_and_line(shapes, root, tmp_path, name):
    """Of a file that is parsed whole it is a fault of the file, of one that is indexed by lines
    one of the sample."""
    lines = [*GOOD_LINES]
    lines[PLACE] = LINE_FAULTS[name]
    (tmp_path / "bad.jsonl").write_bytes(raw(*lines))
    expected = "bad.jsonl: (line 4|not UTF-8 at byte)"
    with pytest.raises(DataError, match=expected) as raised:
        only_batch(module(shapes, LLaVA(str(tmp_path / "bad.jsonl"), str(root), on_error="error")))
    assert "\n" not in str(raised.value)
    assert re.search(
        expected,
        reason_of_skip(shapes, LLaVA(str(tmp_path / "bad.jsonl"), str(root), on_error="skip")),
    )


def reason_of_skip(shapes, source):
    """Why the one wrong record was skipped, or its file refused."""
    try:
        batch = only_batch(module(shapes, source))
    except DataError as error:
        return str(error)
    assert len(batch.ids) == RECORDS - 1
    ((_, _, reason),) = batch.skipped
    return reason


FILE_FAULTS = {
    "missing": (None, "bad.json: no such file"),
    "empty": (b"", "bad.json: .*(no record|not JSON)"),
    "spaces": (b" \n ", "bad.json: .*(no record|not JSON)"),
    "no-records": (b"[]", "bad.json: holds no record"),
    "an-object": (b'{"a": 1}', "bad.json: holds a dict, expected a list"),
    "a-number": (b"7", "bad.json: holds a int, expected a list"),
    "truncated": (b'[{"id": 1}, {"id"', "bad.json: line 1: not JSON"),
    "lines-behind-a-list": (
        raw(b"[" + GOOD_LINES[0] + b"]", GOOD_LINES[1]),
        "bad.json: line 2: not JSON: Extra data",
    ),
    "wrong-encoding": ("[“é”]".encode("cp1252"), "bad.json: not UTF-8 at byte 1"),
    "nested-deep": (b"[" * 100_000, "bad.json: line 1: not JSON"),
    "picture": (b"\x89PNG\r\n\x1a\n", "bad.json: not UTF-8 at byte 0"),
    "folder": (..., "bad.json: "),
}


@pytest.mark.parametrize("on_error", ["error", "skip"])
@pytest.mark.parametrize("name", FILE_FAULTS)
def test_a_wrong_file_stops_whatever_the_policy(shapes, tmp_path, name, on_error):
    content, message = FILE_FAULTS[name]
    if content is ...:
        (tmp_path / "bad.json").mkdir()
    elif content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        only_batch(module(shapes, LLaVA(str(tmp_path / "bad.json"), on_error=on_error)))


WEIGHTS = {
    "nan": (float("nan"), 1.0, "source a has weight nan"),
    "infinite": (float("inf"), 1.0, "source a has weight inf"),
    "negative": (-1.0, 1.0, "source a has weight -1.0"),
    "all-zero": (0.0, 0.0, "weights of all sources"),
}


@pytest.mark.parametrize("on_error", ["error", "skip"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_make_no_mixture_stop_whatever_the_policy(
    shapes, root, tmp_path, name, on_error
):
    first, second, message = WEIGHTS[name]
    file = write_records(tmp_path / "bad.jsonl", [good(number) for number in range(RECORDS)])
    sources = {
        n: LLaVA(file, str(root), weight=w, on_error=on_error)
        for n, w in (("a", first), ("b", second))
    }
    with pytest.raises(ValueError, match=message):
        ChatData(str(shapes / "tokenizer"), sources, {})


OPTIONS = {
    "no-tokenizer": ({"tokenizer": "/nowhere"}, "tokenizer: /nowhere"),
    "unknown-template": (
        {"chat_template": "alpaca3"},
        "chat_template: alpaca3 is none of chatml, llama2",
    ),
    "unknown-policy": (
        {"on_length": "cut"},
        "on_length: cut, expected error, skip or truncate_turns",
    ),
    "unknown-policy-of-a-source": ({"on_length": {"bad": "cut"}}, "on_length: cut, expected"),
    "policy-of-no-source": (
        {"on_length": {"worse": "skip"}},
        "on_length: there is no source worse, expected one of bad",
    ),
}


@pytest.mark.parametrize("on_error", ["error", "skip"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_stops_whatever_the_policy(shapes, root, tmp_path, name, on_error):
    options, message = OPTIONS[name]
    file = write_records(tmp_path / "bad.jsonl", [good(0)])
    with pytest.raises(DataError, match=message):
        ChatData(
            **{"tokenizer": str(shapes / "tokenizer"), "validation": {}, **options},
            sources={"bad": LLaVA(file, str(root))},
        )


ALPACA_FAULTS = {
    "no-output": ({"output": ...}, "sample bad:r3 has no 'output'"),
    "no-instruction": ({"instruction": ...}, "sample bad:r3 has no 'instruction'"),
    "number-for-an-instruction": ({"instruction": 5}, "'instruction' is a int, expected str"),
    "null-for-an-output": ({"output": None}, "'output' is a NoneType, expected str"),
    "empty-output": ({"output": ""}, "turn 2 is an empty answer"),
}


@pytest.mark.parametrize("name", ALPACA_FAULTS)
def test_a_wrong_text_only_sample_is_told_or_skipped(shapes, tmp_path, name):
    change, message = ALPACA_FAULTS[name]
    records = [
        {"id": f"r{number}", "instruction": "Say red.", "output": "red"}
        for number in range(RECORDS)
    ]
    records[PLACE] = {k: v for k, v in {**records[PLACE], **change}.items() if v is not ...}
    file = write_records(tmp_path / "bad.jsonl", records)
    with pytest.raises(DataError, match=message):
        only_batch(module(shapes, Alpaca(file, on_error="error")))
    batch = only_batch(module(shapes, Alpaca(file, on_error="skip")))
    assert len(batch.ids) == RECORDS - 1
    assert re.search(message, batch.skipped[0][2])


def each_line(pattern, replacement):
    """A file of the good lines with something in each replaced."""
    return lambda lines: raw(*[re.sub(pattern, replacement, line) for line in lines])


HARMLESS = {
    "byte-order-mark": lambda lines: b"\xef\xbb\xbf" + raw(*lines),
    "windows-line-ends": lambda lines: b"\r\n".join(lines) + b"\r\n",
    "blank-lines": lambda lines: b"\n\n" + b"\n \n".join(lines) + b"\n\n\n",
    "no-last-line-end": lambda lines: b"\n".join(lines),
    "duplicate-ids": each_line(rb'"r\d"', rb'"same"'),
    "ids-that-are-numbers": each_line(rb'"r(\d)"', rb"\1"),
    "ids-of-two-lines": each_line(rb'"r(\d)"', rb'"r\\n\1"'),
    "no-ids": each_line(rb'"id": "r\d", ', b""),
    "separators-inside-text": each_line(rb"red", "a\u2028b\u0085c".encode()),
    "unknown-fields": each_line(rb'\{"id"', b'{"x": {"y": [1]}, "id"'),
    "a-system-message": each_line(rb'\[\{"from"', b'[{"from": "system", "value": "Hi"}, {"from"'),
    "an-unanswered-last-question": each_line(rb"\}\]", b'}, {"from": "human", "value": "And?"}]'),
    "look-alikes": each_line(rb"red", b"USER: [INST] ASSISTANT: <|im_start|> </s>"),
    "white-space-around-text": each_line(rb"red", rb" \\n red \\n\\n"),
}


@pytest.mark.parametrize("on_error", ["error", "skip"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_wrong_is_delivered_whole(shapes, root, tmp_path, name, on_error):
    (tmp_path / "bad.jsonl").write_bytes(HARMLESS[name](GOOD_LINES))
    batch = only_batch(
        module(shapes, LLaVA(str(tmp_path / "bad.jsonl"), str(root), on_error=on_error))
    )
    assert len(batch.ids) == RECORDS
    assert batch.skipped == []
    assert (batch.labels != -100).any(1).all()


def test_samples_of_one_id_are_told_apart_by_their_place_when_they_are_skipped(
    shapes, root, tmp_path
):
    records = [{**good(number), "id": "same"} for number in range(RECORDS)]
    for number in (2, 5):
        records[number]["image"] = "none.png"
    file = write_records(tmp_path / "bad.jsonl", records)
    batch = only_batch(module(shapes, LLaVA(file, str(root), on_error="skip")))
    assert sorted(sample for _, sample, _ in batch.skipped) == ["bad:2", "bad:5"]


@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_odd_pictures_are_delivered(shapes, tmp_path, on_error):
    expected = write_odd(tmp_path)
    records = [{**good(number), "image": name} for number, name in enumerate(expected)]
    file = write_records(tmp_path / "bad.jsonl", records)
    batch = only_batch(
        module(shapes, LLaVA(file, on_error=on_error), global_batch_size=len(records))
    )
    assert batch.skipped == []
    assert len(batch.pixel_values) == len(expected)
    assert batch.pixel_values.isfinite().all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_which_nothing_is_left_goes_on_with_nothing_to_learn(
    shapes, root, tmp_path, workers
):
    records = [{**good(number), "image": "none.png"} for number in range(RECORDS)]
    file = write_records(tmp_path / "bad.jsonl", records)
    batch = only_batch(module(shapes, LLaVA(file, str(root), on_error="skip"), workers=workers))
    assert len(batch.skipped) == RECORDS
    assert (batch.ids, batch.sources, batch.has_images) == ([], [], False)
    assert batch.input_ids.shape == (1, 1)
    assert (batch.labels == -100).all()


def test_a_pictures_bytes_take_the_place_of_its_path(shapes, root, tmp_path, monkeypatch):
    """As formats with encoded pictures give them."""
    noise().save(tmp_path / "a.png")
    file = write_records(tmp_path / "bad.jsonl", [good(number) for number in range(RECORDS)])
    read = LLaVA.sample

    def with_bytes(self, record, name):
        sample = copy.copy(read(self, record, name))
        sample.images = [
            b"no picture" if record["id"] == "r3" else (tmp_path / "a.png").read_bytes()
        ]
        return sample

    monkeypatch.setattr(LLaVA, "sample", with_bytes)
    batch = only_batch(module(shapes, LLaVA(file, str(root), on_error="skip")))
    assert len(batch.ids) == len(batch.pixel_values) == RECORDS - 1
    assert "sample bad:r3: image of 10 bytes cannot be read" in batch.skipped[0][2]


def test_evaluation_asks_of_what_is_left_and_keeps_to_the_limit(shapes, root, tmp_path):
    from owlfuse.evaluation.metrics import questions_of

    records = [
        {**good(number), "image": "none.png" if number == PLACE else "good.png"}
        for number in range(RECORDS)
    ]
    file = write_records(tmp_path / "bad.jsonl", records)
    data = module(shapes, LLaVA(file, str(root)))
    data.validation = {"bad": data.sources["bad"]}
    with pytest.raises(DataError, match="no image none.png"):
        data.prompts(
            [(sample, data.validation["bad"]) for sample, _, _ in questions_of(data, "bad")]
        )
    data.validation["bad"].on_error = "skip"
    questions = questions_of(data, "bad")
    assert len(questions) == RECORDS - 1
    assert (
        len(
            data.prompts([(sample, data.validation["bad"]) for sample, _, _ in questions]).input_ids
        )
        == RECORDS - 1
    )
    data.validation["bad"].max_skips = 0
    with pytest.raises(
        DataError, match="validation source bad has 1 wrong samples of 8, and its max_skips is 0"
    ):
        questions_of(data, "bad")


def test_there_are_forty_kinds_and_more():
    kinds = [*ALL, *LINE_FAULTS, *FILE_FAULTS, *WEIGHTS, *OPTIONS, *ALPACA_FAULTS]
    assert len(kinds) > 100


@pytest.mark.parametrize(("policy", "kept"), [("skip", [0, 2]), ("truncate_turns", [0, 1, 2])])
def test_evaluation_asks_nothing_of_what_the_policy_for_the_length_leaves_out(
    shapes, root, tmp_path, policy, kept
):
    """The source stops at wrong samples, and chats that are too long are none."""
    from owlfuse.evaluation.metrics import questions_of

    records = [good(number) for number in range(3)]
    records[1]["conversations"] += [
        {"from": "human", "value": "word " * 600},
        {"from": "gpt", "value": "no"},
    ]
    data = module(
        shapes, LLaVA(write_records(tmp_path / "long.jsonl", records), str(root)), on_length=policy
    )
    data.validation = data.sources
    questions = questions_of(data, "bad")
    data.prompts([(sample, data.validation["bad"]) for sample, _, _ in questions])
    expected = [f"bad:{records[number]['id']}" for number in kept]
    assert [sample.id.partition("#")[0] for sample, _, _ in questions] == expected
