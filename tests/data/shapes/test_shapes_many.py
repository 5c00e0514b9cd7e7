"""Chats about one of many pictures."""

import json

import pytest

from owlfuse.data.shapes.many import COUNTS, write_many

SHAPES = {
    "train_pictures": 48,
    "val_pictures": 40,
    "held_out_pictures": 6,
    "text_train": 120,
    "text_val": 8,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_many(str(folder / "many"), str(folder / "shapes"), chats=40, questions=6, shapes=SHAPES)
    return folder / "many", folder / "shapes"


def read(path):
    return json.loads(path.read_text())


def test_a_question_names_its_picture_and_has_the_answer_that_stands_beside_it_in_shapes(folders):
    many, shapes = folders
    for split, files in (("train", ["train"]), ("val", [f"val_{count}" for count in COUNTS])):
        known = {}
        for record in read(shapes / f"{split}.json"):
            turns = [part["value"].removeprefix("<image>\n") for part in record["conversations"]]
            known[record["image"]] = set(zip(turns[::2], turns[1::2]))
        for record in (record for file in files for record in read(many / f"{file}.json")):
            texts = [part["value"] for part in record["conversations"]]
            assert texts[0].count("<image>\n") == len(record["image"]) == len(set(record["image"]))
            for question, answer in zip(texts[::2], texts[1::2]):
                place, _, asked = (
                    question.replace("<image>\n", "").removeprefix("Picture ").partition(": ")
                )
                assert (asked, answer) in known[record["image"][int(place) - 1]]


def test_the_same_questions_about_the_same_pictures_are_asked_whatever_stands_beside_them(folders):
    asked = []
    for count in COUNTS:
        records = read(folders[0] / f"val_{count}.json")
        assert {len(record["image"]) for record in records} == {count}
        asked.append([])
        for record in records:
            place, _, text = (
                record["conversations"][0]["value"]
                .replace("<image>\n", "")[len("Picture ") :]
                .partition(": ")
            )
            asked[-1].append(
                (record["image"][int(place) - 1], text, record["conversations"][1]["value"])
            )
    assert all(questions == asked[0] for questions in asked)


def test_the_same_arguments_write_the_same_and_leave_files_that_are_there_alone(folders):
    many, shapes = folders
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in many.iterdir()}
    write_many(str(many), str(shapes), chats=40, questions=6, shapes=SHAPES)
    assert before == {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in many.iterdir()
    }


@pytest.mark.parametrize("size", [0, 1, 2, 10])
def test_too_few_pictures_are_an_error_that_says_how_many_are_needed(tmp_path, size):
    with pytest.raises(ValueError, match=rf"a chat about \d+ pictures needs .* shapes has {size}$"):
        write_many(
            str(tmp_path / "many"),
            str(tmp_path / "shapes"),
            chats=4,
            shapes={**SHAPES, "val_pictures": size},
        )
    assert not (tmp_path / "many").exists()


@pytest.mark.parametrize("name", ["train.json", "val_1.json", "notes.txt"])
def test_a_folder_of_something_else_stays_as_it_is(folders, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{tmp_path} holds something else \({name}\): choose"):
        write_many(str(tmp_path), str(folders[1]), chats=40, questions=6, shapes=SHAPES)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("argument", ["chats", "most", "questions"])
def test_a_number_below_one_is_refused(tmp_path, argument):
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        write_many(str(tmp_path / "many"), str(tmp_path / "shapes"), **{argument: 0})
