"""The questions of a source: which are asked, of what kind, and which answers are right."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.formats.messages import Messages
from owlfuse.data.media.pictures import Pictures
from owlfuse.evaluation.metrics import Answer, questions_of, sample_questions
from owlfuse.evaluation.questions import question_samples
from owlfuse.model.vision.base import Preprocessing


def source(folder, records, kind=Messages, **options):
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return kind(str(folder / "a.jsonl"), **options)


def asked(folder, records, removed=None):
    """The questions of a file as (text, expected, accepted).

    `removed` of the last turns are cut off to fit the length.
    """
    samples = source(folder, records)
    policy = "error" if removed is None else "truncate_turns"
    load = lambda sample, of: SimpleNamespace(turns_removed=removed)  # noqa: E731
    data = SimpleNamespace(validation={"val": samples}, on_length=policy, load=load)
    return [
        (question.messages[-1]["content"][-1]["text"], expected, question.metadata.get("accepted"))
        for question, expected, _ in questions_of(data, "val")
    ]


def turns(*pairs, **keys):
    """A record of (question, answer) each; `keys` of the record."""
    messages = []
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        answer = answer if isinstance(answer, dict) else {"content": answer}
        messages.append({"role": "assistant", **answer})
    return {"messages": messages, **keys}


def right(answer, accepted):
    return Answer("val", "i", None, "?", "cat", answer, "", tuple(accepted)).right


@pytest.mark.parametrize(
    "record",
    [
        {"answers": ["cat"] * 10},
        {"answers": ["cat"]},
        {"answer": "cat"},
        {"answer": "cat", "answers": "cat"},
        {"answers": ["cat", "", "cat", " "]},
    ],
)
def test_one_rule_judges_all_questions_of_a_source_that_lists_answers(tmp_path, record):
    records = [{"question": "?", **record}, {"question": "?", "answers": ["cat"] * 9 + ["dog"]}]
    for _, expected, accepted in asked(tmp_path, records):
        assert expected == "cat"
        assert right("a cat", accepted)
        assert not right("a", accepted)


def test_a_source_without_lists_of_answers_has_none(tmp_path):
    assert asked(tmp_path, [{"question": "?", "answer": "cat"}]) == [("?", "cat", None)]


def test_behind_a_history_the_answers_are_of_the_last_question(tmp_path):
    record = {"question": "c?", "answers": ["x", "y", "x"], "history": [["a?", "1"], ["b?", "2"]]}
    whole = [("a?", "1", ["1"]), ("b?", "2", ["2"]), ("c?", "x", ["x", "y"])]
    assert asked(tmp_path, [record]) == whole
    # which is not asked where it is cut off
    assert asked(tmp_path, [record], removed=1) == [("a?", "1", None), ("b?", "2", None)]


def test_of_a_chat_that_is_cut_all_questions_are_asked_that_remain(tmp_path):
    """An answer that is not learned is no question, but is cut as others are."""
    record = turns(("a?", "1"), ("b?", {"content": "2", "loss": False}), ("c?", "3"), ("d?", "4"))
    for removed, expected in enumerate((["1", "3", "4"], ["1", "3"], ["1"], ["1"])):
        assert [answer for _, answer, _ in asked(tmp_path, [record], removed)] == expected


THREE = [("a?", "1"), ("b?", "2"), ("c?", "3")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (turns(THREE[0], accepted=[3]), "accepted is .3., expected a list of texts"),
        (turns(THREE[0], accepted=["1", " "]), "expected a list of texts that are not empty"),
        (turns(*THREE, accepted=["3"]), "has accepted answers and 3 questions, expected one"),
        ({"question": "?", "answers": ["a"], "accepted": True}, "accepted is True, expected a"),
        ({"question": "?", "answers": ["", " "]}, "'answers' holds no answer"),
        (
            {"question": "?", "answer": "a", "answers": {"text": ["a"]}},
            "'answers' is {'text'.*list",
        ),
        (
            {"question": "?", "answer": {"a": 1}, "answers": ["a"]},
            "answer {'a': 1}, expected texts",
        ),
        (turns(*THREE, kinds="color"), "'kinds' is color, expected a list of one text for each of"),
        (turns(*THREE, kinds=["color", "shape"]), "'kinds' is .* each of its 3 questions, or of"),
        (turns(*THREE, kinds=3), "'kinds' is 3, expected a list"),
        (turns(*THREE, kinds=[{"a": 1}]), "'kinds' has {'a': 1}, expected a text"),
        (turns(*THREE, kind=["color"]), "'kind' has .'color'., expected a text"),
    ],
)
def test_what_belongs_to_the_questions_is_checked_when_the_record_is_read(
    tmp_path, record, message
):
    with pytest.raises(DataError, match=f"sample a:0.*{message}.*line 1 of a.jsonl"):
        source(tmp_path, [record])[0]


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (Alpaca, {"instruction": "?", "output": "1"}),
        (Captions, {"image": "a.png", "caption": "1"}),
    ],
)
def test_it_is_checked_in_other_formats_too(tmp_path, kind, record):
    options = {"instructions": ["?"]} if kind is Captions else {}
    for key, value in {"accepted": [1], "kinds": "x", "kind": []}.items():
        with pytest.raises(DataError, match=f"sample a:0.*{key}"):
            source(tmp_path, [{**record, key: value}], kind, **options)[0]


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({"kind": None, "kinds": None, "accepted": None}, ["", "", ""]),
        ({"kind": "color"}, ["color"] * 3),
        ({"kind": 2}, ["2"] * 3),
        ({"kinds": ["color"]}, ["color"] * 3),
        ({"kinds": ["color", None, "shape"]}, ["color", "", "shape"]),
    ],
)
def test_kinds_are_one_for_each_question_or_one_for_all(tmp_path, keys, kinds):
    sample = source(tmp_path, [turns(*THREE, **keys)])[0]
    assert [kind for _, _, kind in question_samples(sample)] == kinds


def test_a_question_is_tiled_as_its_chat_is(tmp_path):
    """By which the chat's length was checked."""
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    pictures = Pictures(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic"))
    of = LLaVA(str(tmp_path / "a.json"), str(tmp_path), tile=0.5)
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "1"}]}
    counts = set()
    for number in range(16):
        messages = [{"role": "user", "content": content}, answer]
        chat = Sample(f"a:{number}", "a", messages, ["a.png"])
        [(question, _, _)] = question_samples(chat)
        assert question.id != chat.id
        (views,), (question_views,) = pictures(chat, of), pictures(question, of)
        assert len(question_views) == len(views)
        counts.add(len(views))
    assert len(counts) == 2


def test_a_later_question_has_a_line_break_behind_pictures_where_its_chat_has_them(tmp_path):
    image, asked_again = {"type": "image", "image": "a.png"}, "How many?"
    for break_behind in ("", "\n"):
        content = [image, {"type": "text", "text": f"{break_behind}What?"}]
        record = turns((content, "red"), (asked_again, "2"))
        [sample] = source(tmp_path, [record])
        for question, _, _ in question_samples(sample):
            text = question.messages[-1]["content"][-1]["text"]
            assert text.startswith("\n") is bool(break_behind)


def test_questions_are_spread_over_their_own_pictures_and_videos():
    """Not over those of the examples before them."""
    questions = []
    for number in range(8):
        media = {"images": ["example.png", f"{number // 4}.png"]}
        if number % 2:
            media = {"images": [], "videos": [f"{number // 4}.mp4"]}
        questions.append((Sample(f"s:{number}#0", "val", [], **media), "red", "color"))
    shown = [sample.images[-1:] or sample.videos for sample, _, _ in sample_questions(questions, 4)]
    assert len({media for [media] in shown}) == 4
