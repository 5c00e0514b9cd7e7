"""The published formats: what is asked of each file, and what is said of a wrong one."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from PIL import Image

from helpers import REPO
from owlfuse.config.build import build
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.evaluation.benchmarks.answering import QuestionDataset
from owlfuse.evaluation.benchmarks.base import Task, sample_units
from owlfuse.evaluation.benchmarks.predictions import Predictions
from owlfuse.evaluation.benchmarks.run import read_options
from small_tokenizers import byte_level
from task_files import BENCHMARKS

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YAMLS = sorted((REPO / "configs" / "task").glob("*.yaml"))


def made(task, folder, **changes):
    """The task of a yaml on the small files of its benchmark."""
    folder.mkdir(exist_ok=True)
    node = OmegaConf.load(REPO / "configs" / "task" / f"{task}.yaml")
    return build(
        OmegaConf.merge(node, {k: str(v) for k, v in BENCHMARKS[task](folder).items()}, changes)
    )


def first(task, folder, **changes):
    return made(task, folder, **changes).questions()[0][0]


def text_of(question):
    return "".join(part.get("text", "<image>") for part in question.messages[-1]["content"])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_task_has_small_files_and_says_what_it_needs(path, tmp_path):
    assert path.stem in BENCHMARKS
    task = made(path.stem, tmp_path)
    assert isinstance(task, Task)
    questions, wrong = task.questions()
    assert wrong == []
    assert all(question.expected is not None for question in questions if task.generates)
    json.dumps([question.expected for question in questions])  # predictions.jsonl holds it
    assert task.fingerprint() == made(path.stem, tmp_path).fingerprint()


def test_vqav2(tmp_path):
    question = first("vqav2", tmp_path)
    assert question.id == "262148000"
    assert text_of(question) == "<image>Where is he looking?" + WORD
    assert question.images == ["COCO_val2014_000000262148.jpg"]
    assert question.expected.count("down") == 7
    assert question.group == "other"


def test_textvqa(tmp_path):
    question = first("textvqa", tmp_path)
    assert text_of(question) == "<image>what is the brand of this camera?" + WORD
    assert question.images == ["003a8ae2ef43b901.jpg"]
    assert question.expected.count("dakota") == 5


def test_gqa(tmp_path):
    question = first("gqa", tmp_path)
    assert (question.id, question.images, question.expected) == ("201307251", ["n161313.jpg"], "no")
    assert text_of(question) == "<image>Is it overcast?" + WORD
    assert question.group == "verify"


def test_docvqa(tmp_path):
    question = first("docvqa", tmp_path)
    assert (question.id, question.images, question.expected) == (
        "49153",
        ["documents/pybv0228_81.png"],
        ["0.28"],
    )


def test_pope(tmp_path):
    questions, _ = made("pope", tmp_path).questions()
    assert [question.id for question in questions[:4]] == [
        "random:1",
        "random:2",
        "random:3",
        "popular:1",
    ]
    assert text_of(questions[0]) == "<image>Is there a snowboard in the image?" + WORD
    assert {question.group for question in questions} == {"random", "popular", "adversarial"}


def test_scienceqa(tmp_path):
    text, pictured = made("scienceqa", tmp_path).questions()[0]
    assert (text.id, text.images, text.group) == ("4", [], "LAN")
    assert text_of(text).endswith("the anger of Achilles.\nA. chiasmus\nB. apostrophe" + LETTER)
    assert pictured.images == ["test/11/image.png"]
    assert (text.expected["context"], pictured.expected["context"]) == (["NO"], ["TXT", "IMG"])
    assert text_of(pictured) == (
        "<image>Context: Two magnets are placed as shown.\nWill these magnets attract or repel "
        "each other?\n"
        "A. attract\nB. repel" + LETTER
    )
    assert [
        question.id for question in made("scienceqa", tmp_path, with_pictures=True).questions()[0]
    ] == ["11"]


def test_mmbench_turns_the_options_and_shows_the_picture_of_the_row(tmp_path):
    task = made("mmbench", tmp_path)
    questions = {question.id: question for question in task.questions()[0]}
    assert list(questions) == [
        "241#0",
        "241#1",
        *(f"252#{n}" for n in range(4)),
        *(f"253#{n}" for n in range(3)),
    ]
    turned = questions["252#1"]
    assert text_of(turned) == (
        (
            "<image>Which one is the correct caption of this image?\nA. A dog\nB. A bowl, "
            "full\nC. A "
            '"stop" sign\nD. A cat'
        )
        + LETTER
    )
    assert [questions[f"252#{n}"].expected["letter"] for n in range(4)] == ["D", "C", "B", "A"]
    assert text_of(questions["241#0"]).startswith(
        "<image>The passage below describes an experiment.\nIdentify"
    )
    assert text_of(questions["253#0"]).startswith("<image>What is right?\nChoose.\nA. yes")
    blue, red = (
        Image.open(io.BytesIO(task.pictures(questions[key])[0])).getpixel((9, 9))
        for key in ("252#3", "253#0")
    )
    assert blue[2] > 200 > 60 > blue[0]
    assert red[0] > 200 > 60 > red[2]  # its own field is the index of another row
    assert [
        question.id for question in made("mmbench", tmp_path, circular=False).questions()[0]
    ] == ["241#0", "252#0", "253#0"]


def test_rotations_that_the_publisher_made_are_taken_as_they_are(tmp_path):
    """Rows of an index above 1,000,000 are rotations of the row of the rest (VLMEvalKit)."""
    task = made("mmbench", tmp_path)
    file = tmp_path / "mmbench_dev_20230712.tsv"
    csv.field_size_limit(sys.maxsize)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))[:1]
    rows.append(
        {**rows[0], "index": "1000241", "A": rows[0]["B"], "B": rows[0]["A"], "answer": "A"}
    )
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    questions, _ = task.questions()
    assert [(question.id, question.unit) for question in questions] == [
        ("241#0", "241"),
        ("1000241#0", "241"),
    ]
    lines = [
        {"id": q.id, "expected": q.expected, "group": q.group, "answer": "A"} for q in questions
    ]
    for line in lines:
        line["score"] = task.score(line)
    assert task.metrics(lines)["accuracy"] == 0.0
    assert len(sample_units(questions, 1)) == 2


def test_captions_ask_once_for_each_picture(tmp_path):
    questions, _ = made("captions", tmp_path).questions()
    assert [question.id for question in questions] == ["391895", "522418", "184613"]
    assert text_of(questions[0]) == "<image>Provide a one-sentence caption for the provided image."
    assert len(questions[0].expected) == 2


def test_exact_match_asks_each_question_by_itself(tmp_path):
    questions, _ = made("exact_match", tmp_path, prompt="{question} Shortly.").questions()
    assert [question.expected for question in questions] == [
        "white and red",
        "an advertisement",
        "yes",
    ]
    assert (
        text_of(questions[1])
        == "<image>\nWhat feature can be seen on the back of the bus? Shortly."
    )
    assert [question.images for question in questions][2] == []


def chat_file(folder, **fields):
    """A file of one chat with these fields."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "a cat"}]
    lines = [{"id": "1", "messages": turns}, {"id": "2", "messages": turns, **fields}]
    folder.mkdir(exist_ok=True)
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return {"file": str(path), "format": "messages"}


def test_exact_match_counts_each_accepted_answer_as_the_evaluation_of_a_run_does(tmp_path):
    given = chat_file(tmp_path, accepted=["a cat", "a tom"])
    task = made("exact_match", tmp_path, **given)
    questions, _ = task.questions()
    # one rule for the whole file
    assert [question.expected for question in questions] == [["a cat"], ["a cat", "a tom"]]
    for answer, score in {"It is a Tom.": 1.0, "a cat": 1.0, "a dog": 0.0}.items():
        assert task.score({"answer": answer, "expected": questions[1].expected}) == score


@pytest.mark.parametrize(
    ("name", "ids"),
    [("exact_match", ["chats:1#0", "chats:1#0@2"]), ("perplexity", ["chats:1", "chats:1@2"])],
)
def test_chats_may_have_one_id(name, ids, tmp_path):
    questions, _ = made(name, tmp_path, **chat_file(tmp_path, id="1")).questions()
    assert [question.id for question in questions] == ids


@pytest.mark.parametrize("name", ["exact_match", "perplexity"])
def test_questions_have_the_tools_of_their_chats(name, tmp_path):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    task = made(name, tmp_path, **chat_file(tmp_path, tools=tools))
    questions, _ = task.questions()
    assert [question.tools for question in questions] == [None, tools]
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{{ tools }}{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    processor = SimpleNamespace(tokenizer=tokenizer, image_token="<image>", tile=False)
    prompt, _ = QuestionDataset(task, questions, processor, None).prepare(questions[1])
    assert "look" in prompt


BROKEN = {
    "vqav2": (
        "questions",
        0,
        "question",
        "questions.json: record 1 has no 'question'; it has image_id",
    ),
    "textvqa": (
        "data",
        1,
        "answers",
        "TextVQA_0.5.1_val.json: record 2 has no 'answers'; it has flickr_original_url",
    ),
    "docvqa": ("data", 1, "answers", "val_v1.0_withQT.json: record 2 has no 'answers'"),
    "captions": ("images", 2, "file_name", "captions_val2014.json: record 3 has no 'file_name'"),
    "gqa": (
        None,
        "201640614",
        "answer",
        "testdev_balanced_questions.json: record 2 (201640614) has no 'answer'",
    ),
    "scienceqa": (None, "11", "choices", "problems.json: record 2 (11) has no 'choices'"),
}


@pytest.mark.parametrize("task", BROKEN)
def test_a_wrong_record_is_told_with_file_record_and_field_or_skipped(task, tmp_path):
    key, number, field, expected = BROKEN[task]
    made_task = made(task, tmp_path)
    content = json.loads(made_task.file.read_text())
    del (content[key] if key else content)[number][field]
    made_task.file.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        made_task.questions()
    assert expected in str(caught.value)
    made_task.on_error = "skip"
    questions, [(record, reason)] = made_task.questions()
    assert questions
    assert expected in reason
    assert record.startswith(f"{made_task.file.name}:")
    made_task.max_skips = 0
    with pytest.raises(DataError, match="1 wrong records, and max_skips is 0"):
        made_task.questions()


def damaged(folder, task, change):
    """The task with its file's text changed."""
    task = made(task, folder)
    task.file = task.files()[0]
    task.file.write_text(change(task.file.read_text()))
    return task


@pytest.mark.parametrize(
    ("task", "change", "expected"),
    [
        ("gqa", lambda text: "[]", "questions.json: holds a list, expected an object"),
        ("gqa", lambda text: text[:40], "questions.json: line 1: not JSON"),
        ("gqa", lambda text: "{}", "questions.json: holds no question"),
        (
            "vqav2",
            lambda text: text.replace("262148001", "7"),
            ("has no answers for question_id 7; are both of one split?"),
        ),
        (
            "vqav2",
            lambda text: text.replace("262148001", "262148000"),
            ("a question with the id 262148000 stands before it"),
        ),
        (
            "textvqa",
            lambda text: text.replace('["nous les gosses", ', "["),
            ("'answers' has 9 answers, expected ten people's"),
        ),
        (
            "textvqa",
            lambda text: text.replace('"003a8ae2ef43b901"', "3"),
            ("record 1: 'image_id' is a int, expected a text"),
        ),
        (
            "captions",
            lambda text: json.dumps({**json.loads(text), "images": [{"id": [1]}]}),
            ("record 1: 'id' is a list, expected a whole number"),
        ),
        (
            "pope",
            lambda text: text.replace('"yes"', '"maybe"'),
            ("line 1 (random): 'label' is 'maybe', expected yes or no"),
        ),
        ("pope", lambda text: "{\n" + text, "coco_pope_random.json: line 1: not JSON"),
        (
            "scienceqa",
            lambda text: text.replace('"answer": 1', '"answer": 5'),
            ("'answer' is 5, and there are 2 'choices'"),
        ),
        ("scienceqa", lambda text: text.replace('"11"', '"12"'), "has no problem 11, which"),
        (
            "mmbench",
            lambda text: text.replace("answer\t", "key\t"),
            ("line 1 has no column 'answer'; it has index, question"),
        ),
        (
            "mmbench",
            lambda text: text.replace("\tD\timage", "\tQ\timage"),
            ("line 3: 'index' '252', 4 options and 'answer' 'Q'"),
        ),
        # a fifth option, and a gap
        (
            "mmbench",
            lambda text: text.replace("hint\t", "E\t"),
            "line 2: its options are A, B, E, expected A, B, ... without a gap, D the last",
        ),
        (
            "mmbench",
            lambda text: text.replace("A cat\tA dog", "A cat\t"),
            "line 3: its options are A, C, D, expected A, B",
        ),
        (
            "mmbench",
            lambda text: text.replace("A cat\tA dog", "A cat"),
            ("line 3, which begins '252', has 13 fields, the header has 14"),
        ),
        (
            "captions",
            lambda text: text.replace('"id": 522418', '"id": 5'),
            ("'images' has no image_id 522418"),
        ),
        ("exact_match", lambda text: text.replace('"gpt"', '"owl"'), "(record 1 of chats.json)"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_a_line(task, change, expected, tmp_path):
    with pytest.raises(DataError) as caught:
        damaged(tmp_path, task, change).questions()
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"\tA cat", b"\xff"])
def test_a_row_that_cannot_be_read_is_left_out_where_it_may_be(damage, tmp_path):
    task = made("mmbench", tmp_path, on_error="skip")
    lines = task.file.read_bytes().splitlines(keepends=True)
    # without the tabs before it, or no UTF-8
    lines[2] = damage + b"\n"
    task.file.write_bytes(b"".join(lines))
    questions, skipped = task.questions()
    assert questions
    [(record, reason)] = skipped
    assert record.endswith(":2")
    assert "line 3" in reason


def test_a_line_of_a_second_file_that_cannot_be_read_is_left_out_where_it_may_be(tmp_path):
    task = made("pope", tmp_path, on_error="skip")
    file = task.files()[1]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "{\n", *lines[2:]]))
    questions, skipped = task.questions()
    assert len(questions) == 8
    [(record, reason)] = skipped
    assert record.endswith(":5")
    assert f"{file}: line 2: not JSON" in reason


def test_a_picture_that_is_no_base64_is_told(tmp_path):
    task = made("mmbench", tmp_path)
    question = task.questions()[0][0]
    task.file.write_text(task.file.read_text().replace("/9j/", "????"))
    with pytest.raises(DataError, match="index 241: 'image' is not base64"):
        task.open() and task.pictures(question)


def test_a_missing_file_is_told(tmp_path):
    task = made("vqav2", tmp_path)
    task.annotations.unlink()
    with pytest.raises(DataError, match=r"annotations\.json: no such file"):
        task.questions()


def test_a_pattern_of_a_pictures_file_that_cannot_be_filled_in_is_told(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"task\.image_name: '\{id\}\.jpg' cannot be filled in .* its fields are \{image_id\}",
    ):
        made("gqa", tmp_path, image_name="{id}.jpg").questions()


MINE = """
_target_: mytask.Riddles
file: ???
"""
CODE = """
from dataclasses import dataclass

from owlfuse.evaluation.benchmarks.gqa import GQA


@dataclass(kw_only=True)
class Riddles(GQA):
    hint: str = "Think."
"""


def test_a_task_of_ones_own_is_a_file_and_a_yaml(tmp_path, monkeypatch):
    (tmp_path / "configs" / "task").mkdir(parents=True)
    (tmp_path / "configs" / "task" / "mine.yaml").write_text(MINE)
    (tmp_path / "configs" / "task" / "odd.yaml").write_text(
        MINE.replace("mytask.Riddles", "pathlib.Path")
    )
    (tmp_path / "mytask.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options, task = read_options(
        ["task=mine", "task.file=x.json", "+task.hint=Guess.", "batch_size=2"]
    )
    assert (options.name, options.batch_size) == ("mine", 2)
    assert (type(task).__name__, task.hint, str(task.file)) == ("Riddles", "Guess.", "x.json")
    with pytest.raises(ConfigError, match=r"configs/task/mine\.yaml: task\.file: needs a value"):
        read_options(["task=mine"])
    with pytest.raises(ConfigError, match="odd.yaml: task._target_: pathlib.Path is no Task"):
        read_options(["task=odd", "task.file=x.json"])


def test_predictions_are_not_mixed_with_a_file_of_others(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"question_id": 1, "text": "a"}\n')
    with pytest.raises(
        DataError, match="line 1 is no prediction of ours; name another folder: out=DIR"
    ):
        Predictions(tmp_path, "key").read()


def test_the_ranks_predictions_are_joined_in_order_and_lines_of_others_stay(tmp_path):
    first, second = Predictions(tmp_path, "key"), Predictions(tmp_path, "key", rank=1)
    Predictions(tmp_path, "other").append([{"id": "a", "answer": "of other settings"}])
    first.append([{"id": "c", "skipped": "no picture"}, {"id": "a", "answer": "1"}])
    second.append([{"id": "b", "answer": "2"}, {"id": "c", "answer": "3"}])
    second.append([{"id": "a", "skipped": "the disk was away, in an earlier try"}])
    done, others = first.read()
    assert {key: line.get("answer") for key, line in done.items()} == {"a": "1", "b": "2", "c": "3"}
    first.finish([done[key] for key in "abc"], others)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["settings"], line["id"]) for line in lines] == [
        ("other", "a"),
        ("key", "a"),
        ("key", "b"),
        ("key", "c"),
    ]
    assert first.read() == (done, others)


def test_a_picture_that_another_projects_mark_shows_is_not_put_first(tmp_path):
    task = made("gqa", tmp_path)
    with pytest.raises(DataError, match="the text has <image 1> and 1 pictures are shown"):
        task.user_turn("What is in <image 1>?", ["a.png"])
    # without a picture it is a word
    assert task.user_turn("What is in <image 1>?", [])
