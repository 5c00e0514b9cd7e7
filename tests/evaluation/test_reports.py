"""What is written after a run holds for pictures that are no files, as tables and shards have
them."""

import hashlib
import io
import json

from PIL import Image

from owlfuse.evaluation.metrics import Answer
from owlfuse.evaluation.reports import write_answers, write_contact_sheet


def test_a_picture_of_bytes_is_shown_on_the_sheet_and_left_out_of_the_answers(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 255)).save(file, "PNG")
    answers = [Answer("val", "val:1", file.getvalue(), "Which color?", "red", "red", "")]
    write_answers(tmp_path / "answers.jsonl", answers)
    line = json.loads((tmp_path / "answers.jsonl").read_text())
    assert line["image"] is None
    assert line["image_hash"] == hashlib.sha256(file.getvalue()).hexdigest()
    write_contact_sheet(tmp_path / "sheet.png", answers, 4, "title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (255, 0, 255) in {color for _, color in sheet.convert("RGB").getcolors(2**24)}


def test_an_id_that_is_no_utf8_comes_back_from_the_answers(tmp_path):
    write_answers(
        tmp_path / "a.jsonl", [Answer("val", "val:\udcff", "é\ud83d.png", "", "", "", "")]
    )
    record = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    assert (record["id"], record["image"]) == ("val:\udcff", "é\ud83d.png")


def test_any_answer_can_stand_on_the_sheet(tmp_path, recwarn):
    """Early models write what a plot would take as a formula, characters that no font has, and
    at length."""
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    said = ["$x^{", "$$\\frac$", "\x1b\x13\x00", "red and " * 30, ""]
    answers = [
        Answer("val", str(n), path, "Which $ and $y_{?", "$", text, "")
        for n, text in enumerate(said)
    ]
    for answer in answers:
        write_contact_sheet(tmp_path / "sheet.png", [answer], 4, "title")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.size[0] > 100
    assert [str(warning.message) for warning in recwarn] == []
