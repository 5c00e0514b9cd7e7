"""The tutorial, word for word, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPO
from owlfuse.__main__ import main
from pages import blocks

TUTORIAL = REPO / "docs" / "tutorial.md"


def test_the_error_that_the_tutorial_shows_is_the_one_that_is_told(capsys):
    [shown] = blocks(TUTORIAL, "text")
    assert main(["train", "model/fusion=hyperattentoin"]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.slow
def test_the_tutorial_runs_word_for_word_in_an_empty_folder(tmp_path):
    script = "set -euo pipefail\n" + "\n".join(blocks(TUTORIAL, "sh"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPO / "src")}
    ran = subprocess.run(
        ["bash", "-x"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    # Lightning's words on a folder that two loggers share
    assert "will be deleted" not in ran.stderr
    for file in (
        "shapes_owl3/first/contact_sheet.png",
        "flags/second/results.json",
        "stripes/report/index.html",
    ):
        assert (tmp_path / "runs" / file).is_file()
