"""The working folder that the page on extending shows, copied and filled with small data."""

import json
import shutil
import sys

import pytest
from PIL import Image

from helpers import REPO


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The folder, current, with the files that its experiment and its benchmark name."""
    folder = tmp_path / "work"
    shutil.copytree(REPO / "docs" / "examples", folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # as the command line does for the folder one works in
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        del sys.modules[name]


@pytest.fixture
def questions(examples):
    """questions.json and counts.json about four pictures."""
    (examples / "pictures").mkdir()
    colors = ("red", "green", "blue", "white")
    for color in colors:
        Image.new("RGB", (40, 30), color).save(examples / "pictures" / f"{color}.png")
    asked = [
        {"picture": f"{c}.png", "question": "What color is it?", "answer": c, "author": "me"}
        for c in colors
    ]
    (examples / "questions.json").write_text(json.dumps({"questions": asked}))
    counted = [
        {"id": n, "image": f"{c}.png", "question": "How many?", "number": n}
        for n, c in enumerate(colors)
    ]
    (examples / "counts.json").write_text(json.dumps(counted))
    return examples
