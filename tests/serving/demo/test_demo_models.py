"""The demo's models: told apart by name, described, and refused in one line."""

import re

import pytest

from owlfuse import __main__
from owlfuse.core import packages
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.serving.demo.command import check_folders
from owlfuse.serving.demo.models import unique_names


def test_models_are_told_apart_by_the_shortest_ends_of_their_paths(tmp_path):
    assert unique_names([tmp_path / "owl1", tmp_path / "owl3"]) == ["owl1", "owl3"]
    assert unique_names([tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "c"]) == [
        "a/out",
        "b/out",
        "c",
    ]
    assert unique_names([tmp_path / "x" / "a" / "out", tmp_path / "y" / "a" / "out"]) == [
        "x/a/out",
        "y/a/out",
    ]


def test_each_model_says_its_fusion_and_where_it_is_from(loaded):
    models, said = loaded
    assert [model.name for model in models] == ["concat/out", "hyper/out"]
    assert models[0].facts == [
        "fusion: Concat",
        "export of run_concat",
        "vit_tiny_patch16_224, LinearConnector, qwen2",
    ]
    assert models[1].facts[:2] == ["fusion: HyperAttention (adaptive)", "export of run_hyper"]
    assert [line.split(":")[0] for line in said[1::2]] == ["  concat/out", "  hyper/out"]
    assert re.fullmatch(r"loading .*/hyper/out \(2 of 2\)", said[2])


def test_a_wrong_folder_is_told_before_anything_is_loaded(exported, tmp_path):
    good = str(exported / "concat" / "out")
    with pytest.raises(DataError, match="nowhere: no model: it is not a folder; name a run"):
        check_folders([good, str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"nor an export's config\.json; name a run"):
        check_folders([good, str(tmp_path)])
    with pytest.raises(ConfigError, match="is named twice; name each model once"):
        check_folders([good, good + "/."])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo"], "required: OUT"),
        (["demo", "nowhere"], "nowhere: no model: it is not a folder"),
        (["demo", ".", "--port", "many"], "invalid int value: 'many'"),
        (["demo", ".", "--share"], "--share: no such option of demo"),
    ],
)
def test_the_command_line_is_answered_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # whether or not the extra is installed
    monkeypatch.setattr("owlfuse.serving.demo.command.find_spec", lambda name: object())
    try:
        code = __main__.main(argv)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_extra_is_told_in_one_line(exported, monkeypatch, capsys):
    monkeypatch.setattr("owlfuse.serving.demo.command.find_spec", lambda name: None)
    assert __main__.main(["demo", str(exported / "concat" / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "owlfuse: error: owlfuse demo needs the package gradio, which is not installed"
    )
    assert "pip install 'owlfuse[demo]'" in error
    assert error.count("\n") == 1
    assert packages.EXTRAS["gradio"] == "demo"
