"""Which names of a model's files are accepted, and that what is not accepted is not imported."""

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import owlfuse.__main__
from owlfuse.config import trust
from owlfuse.config.compose import compose
from owlfuse.config.trust import SLOTS, check_names, check_target, read_run_config
from owlfuse.core.errors import ConfigError, DataError

REPO = Path(__file__).resolve().parents[2]
SOURCE = (
    "open('imported', 'w').close()\nfrom subprocess import run\nfrom torch import "
    "nn\n\n\nclass Mine(nn.Module): ...\n"
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a module of the user's, and nothing that is trusted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(trust, "accepted", set())
    monkeypatch.setenv(trust.ENVIRONMENT, "")
    (tmp_path / "my_module_of_parts.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("my_module_of_parts", None)


def check(target, path="model.connector", folder="runs/a"):
    check_target(path, target, Path(folder) / "config.yaml")


def test_every_part_of_our_yamls_is_accepted_where_it_stands():
    """Each group's yaml is composed, so that a new one that the gate does not know shows here."""
    groups = {
        path.parent.relative_to(REPO / "configs") for path in (REPO / "configs").rglob("*.yaml")
    } - {
        Path("task"),
        Path("."),
    }
    for group in sorted(groups):
        for file in sorted((REPO / "configs" / group).glob("*.yaml")):
            node = yaml.safe_load(file.read_text())
            path = {"model/adapter": "model.adapter.llm", "data/source": "data.sources.a"}.get(
                str(group), str(group).replace("/", ".")
            )
            for found, part in trust.nodes_of({path: node}):
                if isinstance(part.get("_target_"), str):
                    slots = [slot for slot in SLOTS if part["_target_"] in slot.targets]
                    assert slots, f"{file}: {part['_target_']} is in none of SLOTS"
                    check(part["_target_"], found)


def test_the_default_configuration_passes():
    config = OmegaConf.to_container(compose(["experiment=null"]), resolve=True)
    check_names(config, Path("config.yaml"))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.exec",
        "owlfuse.artifacts.runs.os.system",
        "owlfuse.data.shapes.write.write_shapes",
        "torch.nn.Linear",
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        "model.vision",
        "model.llm",
        "model.adapter.llm",
        "trainer.callbacks.0",
        "optim",
        "data.prepare",
    ],
)
def test_no_other_callable_is_accepted_by_any_key(target, path, place):
    if (target, path) == ("owlfuse.data.shapes.write.write_shapes", "data.prepare"):
        return check(target, path)
    with pytest.raises(DataError, match=target.replace(".", r"\.")):
        check(target, path)


def test_a_users_part_is_accepted_when_it_is_trusted_and_only_what_its_module_defines(place):
    with pytest.raises(DataError, match="write: owlfuse --trust my_module_of_parts"):
        check("my_module_of_parts.Mine")
    assert not (place / "imported").exists()
    trust.trust("my_module_of_parts")
    check("my_module_of_parts.Mine")
    with pytest.raises(DataError, match="only imports it from subprocess"):
        check("my_module_of_parts.run", "model.llm")
    with pytest.raises(DataError, match="not what model.fusion takes"):
        check("my_module_of_parts.Mine", "model.fusion")


def test_a_users_part_is_accepted_when_a_yaml_of_the_user_names_it(place):
    (place / "configs/model/connector").mkdir(parents=True)
    (place / "configs/model/connector/mine.yaml").write_text("_target_: my_module_of_parts.Mine\n")
    check("my_module_of_parts.Mine")
    with pytest.raises(DataError, match="no yaml of yours names it"):
        check("my_module_of_parts.Other")


def test_a_folder_does_not_vouch_for_itself(place):
    """Its own configs/ are not the user's, also where the command is given in the folder."""
    (place / "configs").mkdir()
    (place / "configs/a.yaml").write_text("_target_: my_module_of_parts.Mine\n")
    with pytest.raises(DataError, match="no yaml of yours names it"):
        check("my_module_of_parts.Mine", folder=".")


def test_a_part_of_the_command_line_is_accepted_for_the_rest_of_the_command(place):
    trust.accept({"model": {"connector": {"_target_": "my_module_of_parts.Mine"}}})
    check("my_module_of_parts.Mine")


def test_a_module_of_the_working_folder_stands_for_no_package_that_a_library_looks_for(place):
    """The working folder becomes a place for modules when a part of the user's is asked for, and
    not before."""
    assert str(place) not in sys.path
    (place / "no_such_package.py").write_text(SOURCE)
    (place / "runs").mkdir()
    (place / "runs/config.yaml").write_text("model: {vision: {_target_: no_such_package.Mine}}\n")
    with pytest.raises(DataError):
        read_run_config(place / "runs")
    assert not (place / "imported").exists()
    assert str(place) not in sys.path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+model.vision.kwargs={pretrained_cfg_overlay: {file: /w/vit.bin}}"],
            "command line: vision.kwargs.pretrained_cfg_overlay: a file .* model.vision.weights$",
        ),
        (
            ["+model.vision.kwargs={checkpoint_path: /w/vit.bin}"],
            "command line: vision.kwargs.checkpoint_path: a file .* by model.vision.weights$",
        ),
        (
            ["+model.llm.config.vision_config={model_args: {checkpoint_path: /w/vit.bin}}"],
            "command line: model.llm.*checkpoint_path: a file .* by model.llm.pretrained$",
        ),
    ],
)
def test_weights_that_no_run_may_name_are_refused_before_it_is_trained(words, message):
    with pytest.raises(ConfigError, match=message):
        compose(words)


@pytest.mark.parametrize("word", ["name", "experiment"])
@pytest.mark.parametrize(
    "value",
    [
        "../x",
        "a/../../x",
        "/tmp/x",
        ".",
        "..",
        "a//b",
        "a/",
        "",
        "a\\x00b",
        "a\\x1b[2Jb",
        "x" * 300,
        "a/" * 600 + "b",
    ],
)
def test_a_name_stays_below_the_folder_of_runs(word, value, monkeypatch, tmp_path):
    from owlfuse.config.messages import check_name

    with pytest.raises(ConfigError) as caught:
        check_name(f"command line: {word}", value.encode().decode("unicode_escape"))
    assert str(caught.value).startswith(f"command line: {word}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "words", [["name=../x"], ["name=/tmp/x"], ['name="a/../../x"'], ["name='..'"]]
)
def test_names_of_the_command_line_are_checked(words):
    with pytest.raises(ConfigError, match="name: .* leads out of the folder"):
        compose(words)


@pytest.mark.parametrize("path", ["model.adapter.llm", "optim", "data.prepare"])
def test_owlfuse_run_as_a_module_is_no_module_of_the_users(place, monkeypatch, path):
    """`python -m owlfuse` has its own commands in a module called `__main__`."""
    monkeypatch.setitem(sys.modules, "__main__", owlfuse.__main__)
    with pytest.raises(DataError, match=r"__main__.main is no part of owlfuse"):
        check("__main__.main", path)
