"""Composition and its errors, each held to its exact line, over a small tree of configuration
with parts of its own."""

import copy
import os
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from owlfuse.config.check import check_targets
from owlfuse.config.compose import check, compose, find_run, origin_of, sweep_cells
from owlfuse.config.folders import find_folders
from owlfuse.core.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]

PARTS = """
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union

if TYPE_CHECKING:
    from nowhere import Thing


class Vision:
    def __init__(self, name: str, width: int = 8): ...


class Linear:
    def __init__(self, in_width: int, patches: int, out_width: int, bias: bool = True): ...


class Concat:
    def __init__(self, connector_tokens: int): ...


class HyperAttention:
    def __init__(
        self, connector_tokens: int, layers: "list[int]", gate: Literal["adaptive", "static"] = "adaptive"
    ): ...


class Llm:
    def __init__(self, vocab_size: int, width: int = 16): ...

    @classmethod
    def tiny(cls, vocab_size: int): ...


class Full:
    def __init__(self, parts: "list[Thing] | None" = None): ...


class Trainer:
    def __init__(self, max_steps: int = 10, limit: Union[int, float, None] = None, plugin: "Vision | None" = None): ...


class AdamW:
    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), foreach: bool = None): ...


class Shapes:
    def __init__(self, folder: Path, **anything): ...


NUMBER = 3
"""
TREE = {
    "configs/train.yaml": (REPO / "configs" / "train.yaml").read_text(),
    "configs/model/vision/convnet.yaml": "_target_: toyparts.Vision\nname: convnet\n",
    "configs/model/connector/linear.yaml": "_target_: toyparts.Linear\n",
    "configs/model/fusion/hyperattention.yaml": (
        "_target_: toyparts.HyperAttention\nlayers: [1, 3]\n"
    ),
    "configs/model/fusion/concat.yaml": "_target_: toyparts.Concat\n",
    "configs/model/fusion/modality_adaptive.yaml": "_target_: toyparts.Concat\n",
    "configs/model/llm/tiny_llama.yaml": "_target_: toyparts.Llm\n",
    "configs/model/adapter/full.yaml": "_target_: toyparts.Full\n",
    "configs/model/adapter/frozen.yaml": "_target_: toyparts.Full\nparts: [1]\n",
    "configs/data/shapes.yaml": "_target_: toyparts.Shapes\nfolder: data/shapes\n",
    "configs/trainer/cpu.yaml": "_target_: toyparts.Trainer\nmax_steps: 10\n",
    "configs/optim/adamw.yaml": "_target_: toyparts.AdamW\nlr: 1e-3\nbetas: [0.9, 0.95]\n",
    "configs/logger/csv_tensorboard.yaml": "csv: {}\n",
    "configs/callbacks/none.yaml": "{}\n",
    "configs/evaluation/default.yaml": "metrics: [accuracy]\n",
    "experiments/shapes_owl1.yaml": (
        "# @package _global_\ndefaults:\n  - override /model/fusion: concat\n\ntrainer:\n  "
        "max_steps: 20\n"
    ),
    "experiments/shapes_owl3.yaml": "seed: 5\nmodel:\n  fusion:\n    gate: static\n",
    "experiments/ablation/lr.yaml": (
        "hydra:\n  sweeper:\n    params:\n      optim.lr: 0.1,0.2\n      seed: 1\n"
    ),
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture(scope="module", autouse=True)
def toyparts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "toyparts.py").write_text(PARTS)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("toyparts", None)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project's folder, and the working folder."""
    write(tmp_path, TREE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*overrides: str):
    return compose(list(overrides), config_dir="configs")


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_last_choice_of_an_optional_group_counts(tree):
    write(tree, {"configs/callbacks/one.yaml": "one: {}\n"})
    assert composed("callbacks=null", "callbacks=one").callbacks == {"one": {}}
    assert composed("callbacks=one", "callbacks=null").callbacks is None
    assert composed("callbacks=null").callbacks is None


def test_a_group_that_an_experiment_overrides_twice_is_refused(tree):
    text = "defaults:\n- override /model/fusion: concat\n- override /model/fusion: hyperattention\n"
    write(tree, {"experiments/twice.yaml": text})
    assert "twice.yaml: defaults: model/fusion is overridden twice" in message("experiment=twice")


def test_without_an_experiment_the_groups_of_the_root_file_are_composed(tree):
    config = composed()
    assert config.experiment == "default"
    assert config.model.fusion == {"_target_": "toyparts.HyperAttention", "layers": [1, 3]}
    assert set(config.model.adapter) == {"vision", "connector", "fusion", "llm"}
    assert "hydra" not in config


def test_an_experiment_overrides_groups_and_keys_and_the_command_line_overrides_it(tree):
    config = composed("experiment=shapes_owl1", "seed=3")
    assert (config.experiment, config.trainer.max_steps, config.seed) == ("shapes_owl1", 20, 3)
    assert config.model.fusion._target_ == "toyparts.Concat"
    config = composed(
        "experiment=shapes_owl1", "model/fusion=hyperattention", "trainer.max_steps=30"
    )
    assert (config.model.fusion._target_, config.trainer.max_steps) == (
        "toyparts.HyperAttention",
        30,
    )


def test_an_experiment_needs_no_package_header_and_may_lie_in_a_folder(tree):
    assert composed("experiment=shapes_owl3").model.fusion.gate == "static"
    assert composed("experiment=ablation/lr").experiment == "ablation/lr"


def test_an_experiment_named_default_is_used_unless_another_or_none_is_asked_for(tree):
    write(tree, {"experiments/default.yaml": "seed: 9\n"})
    assert composed().seed == 9
    assert composed("experiment=shapes_owl3").seed == 5
    assert composed("experiment=null").seed == 0


def test_interpolations_are_resolved_and_a_number_may_be_a_name(tree):
    config = composed("trainer.max_steps=${seed}", "seed=7", "name=12")
    assert config.trainer.max_steps == 7
    assert OmegaConf.to_container(config, resolve=False)["trainer"]["max_steps"] == 7
    assert config.name == "12"


def test_folders_of_the_working_folder_add_to_the_packages(tmp_path, monkeypatch):
    write(tmp_path, {"configs/model/connector/mine.yaml": "", "experiments/my_own.yaml": ""})
    monkeypatch.chdir(tmp_path)
    folders = find_folders()
    assert folders.configs == (REPO / "configs", tmp_path / "configs")
    assert "mine" in folders.options("model/connector")
    assert "my_own" in folders.experiment_names
    monkeypatch.chdir(REPO)
    assert find_folders().configs == (REPO / "configs",)


def test_the_users_own_groups_and_experiments_are_composed_with_ours(tree, monkeypatch):
    write(tree, {"mine it's/configs/model/fusion/own.yaml": "_target_: toyparts.Concat\n"})
    write(tree, {"mine it's/experiments/own.yaml": "defaults:\n  - override /model/fusion: own\n"})
    ours, theirs = find_folders("configs"), find_folders("mine it's/configs")
    both = type(ours)(ours.configs + theirs.configs, ours.experiments + theirs.experiments)
    monkeypatch.setattr("owlfuse.config.compose.find_folders", lambda config_dir: both)
    config = compose(["experiment=own"])
    assert config.model.fusion._target_ == "toyparts.Concat"
    assert origin_of(config, "model.fusion") == "mine it's/configs/model/fusion/own.yaml"


def test_folders_beside_the_experiments_are_no_groups(tree, monkeypatch):
    write(tree, {"mine/experiments/first.yaml": "seed: 5\n"})
    write(tree, {"mine/experiments/folder/second.yaml": "defaults:\n  - /experiments/first\n"})
    for key in ("runs", "name", "seed"):
        (tree / "mine" / key).mkdir()
    monkeypatch.chdir(tree / "mine")
    config = compose(["experiment=folder/second", "runs=elsewhere", "name=first"])
    assert (config.runs, config.name, config.seed) == ("elsewhere", "first", 5)
    assert compose(["experiment=folder/second", "seed=7"]).seed == 7


def test_an_experiment_of_another_folder_is_not_taken(tree, monkeypatch):
    """Hydra keeps what it is given for as long as the process lives."""
    write(tree, {"first/experiments/part.yaml": "seed: 5\n"})
    write(tree, {"second/experiments/user.yaml": "defaults:\n  - /experiments/part\n"})
    monkeypatch.chdir(tree / "first")
    assert compose(["experiment=part"]).seed == 5
    monkeypatch.chdir(tree / "second")
    with pytest.raises(ConfigError, match="part: no such experiment") as error:
        compose(["experiment=user"])
    assert "\n" not in str(error.value)


def test_composition_does_not_depend_on_the_working_folder(tree, tmp_path_factory, monkeypatch):
    here = composed("experiment=shapes_owl3")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    there = compose(["experiment=shapes_owl3"], config_dir=tree / "configs")
    assert here == there
    assert origin_of(there, "model.fusion.gate") == str(tree / "experiments/shapes_owl3.yaml")
    assert os.listdir() == []


def test_the_origin_of_a_key_is_the_last_place_that_sets_it(tree):
    config = composed(
        "experiment=shapes_owl3", "+model.vision.width=4", "model/adapter@model.adapter.llm=frozen"
    )
    origins = {
        "model.vision.width": "command line",
        "model.vision.name": "configs/model/vision/convnet.yaml",
        "model.fusion.gate": "experiments/shapes_owl3.yaml",
        "model.fusion.layers.1": "configs/model/fusion/hyperattention.yaml",
        "model.fusion": "experiments/shapes_owl3.yaml",
        "model.fusion._target_": "configs/model/fusion/hyperattention.yaml",
        "model.adapter.llm.parts": "configs/model/adapter/frozen.yaml",
        "model.adapter.vision": "configs/model/adapter/full.yaml",
        "seed": "experiments/shapes_owl3.yaml",
        "runs": "configs/train.yaml",
    }
    assert {key: origin_of(config, key) for key in origins} == origins
    # so does a copy, and neither has a key for it
    copied = copy.deepcopy(config)
    assert {key: origin_of(copied, key) for key in origins} == origins
    assert copied == config
    assert "composition" not in config


GRAMMAR = (
    "See https://hydra.cc/docs/1.2/advanced/override_grammar/basic for details; a value with "
    "special characters needs quotes: key='\"a=b\"'"
)
COMMAND_LINE_ERRORS = {
    "trainer.max_stps=3": "trainer.max_stps: no such key; did you mean 'trainer.max_steps'?",
    "max_steps=3": "max_steps: no such key; did you mean 'trainer.max_steps'?",
    "fusion=concat": "fusion: no such key; did you mean 'model/fusion'?",
    "trainer.limit=3": (
        "trainer.limit: no file sets this argument; to add it, write +trainer.limit=3"
    ),
    "+trainer.limt=3": "trainer.limt: no such key of toyparts.Trainer; did you mean 'limit'? "
    "(there are: limit, max_steps, plugin)",
    "+seed=3": "+seed=3: the key exists; write seed=3",
    "+sed=3": "sed: no such key; did you mean 'seed'?",
    "seed=1.5": "seed: 1.5 is not a whole number (int)",
    "seed=true": "seed: True is not a whole number (int)",
    "name=[a]": "name: ['a'] is not text (str) or null",
    "optim.lr=fast": "optim.lr: 'fast' is not a number (float)",
    "optim.betas=[a,0.9]": "optim.betas: ['a', 0.9] is not a tuple[float, float]",
    "+trainer.limit=all": (
        "trainer.limit: 'all' is not a whole number (int) or a number (float) or null"
    ),
    "+model.fusion.gate=statc": (
        "model.fusion.gate: 'statc' is not one of 'adaptive', 'static'; did you mean 'static'?"
    ),
    "model.fusion.layers=[1,x]": "model.fusion.layers: [1, 'x'] is not a list[int]",
    "+model.connector.in_width=4": (
        "model.connector.in_width: the code gives this argument; remove the key"
    ),
    "model.fusion._target_=toyparts.Hyperattention": "model.fusion._target_: toyparts has no 'Hyperattention'; "
    "did you mean 'HyperAttention'?",
    "model.llm._target_=toyparts.Llm.tny": (
        "model.llm._target_: toyparts.Llm has no 'tny'; did you mean 'tiny'?"
    ),
    "model.llm._target_=owlfus.llm": (
        "model.llm._target_: no module 'owlfus' can be imported; did you mean 'owlfuse'?"
    ),
    "model.llm._target_=owlfuse.__main__.x.y": "model.llm._target_: owlfuse.__main__ has no 'x'",
    "model.llm._target_=toyparts.NUMBER": (
        "model.llm._target_: toyparts.NUMBER is not a class or function"
    ),
    "model.llm._target_=import os": (
        "model.llm._target_: 'import os' is not a dotted path to a class or function"
    ),
    "~model.vision._target_": "model.vision._target_: not set, and required",
    "trainer={}": None,  # an empty group is merged: nothing changes
    "model/fusion=hyperatention": "model/fusion=hyperatention: no such option; did you mean 'hyperattention'? "
    "(there are: concat, hyperattention, modality_adaptive)",
    "model/fusion=null": (
        "model/fusion=null: no such option (there are: concat, hyperattention, modality_adaptive)"
    ),
    "trainer=5": "trainer=5: no such option (there are: cpu)",
    "model/fuson=concat": "model/fuson: no such group; did you mean 'model/fusion'? (there are: callbacks, data, "
    "evaluation, logger, "
    "model/adapter, model/connector, model/fusion, model/llm, model/vision, optim, trainer)",
    "model/adapter=full": "Could not override 'model/adapter'. Did you mean to override one of "
    "model/adapter@model.adapter.connector, model/adapter@model.adapter.fusion, "
    "model/adapter@model.adapter.llm, model/adapter@model.adapter.vision? To append to your "
    "default list use +model/adapter=full",
    "model.fusion=concat": (
        "model.fusion=concat: this replaces a whole group; did you mean model/fusion=concat?"
    ),
    "experiment=shapes_owl4": (
        "experiment=shapes_owl4: no such experiment; did you mean 'shapes_owl3'?"
    ),
    "experiment=zzz": (
        "experiment=zzz: no such experiment (there are: ablation/lr, shapes_owl1, shapes_owl3)"
    ),
    "experiments=shapes_owl1": "experiments: no such key; did you mean 'experiment'?",
    "shapes_owl1": "shapes_owl1: not of the form key=value; did you mean experiment=shapes_owl1?",
    "a=[1,": f"a=[1,: no viable alternative at input '[1,' {GRAMMAR}",
    "name=a=b": f"name=a=b: mismatched input '=' expecting <EOF> {GRAMMAR}",
    "a b=3": f"a b=3: LexerNoViableAltException: a b=3 ^ {GRAMMAR}",
    "seed=1,2": "seed=1,2: several values; write a list as key=[a,b], or add -m to owlfuse train for a run of each",
    "model/fusion=concat,hyperattention": (
        "model/fusion=concat,hyperattention: several values; choose one, or add -m to owlfuse train for a run of each"
    ),
    "model/fusion=[concat,hyperattention]": (
        "model/fusion=[concat,hyperattention]: model/fusion is one part, of which Hydra would mix "
        "the options; choose one"
    ),
    "hydra.job.name=x": (
        "hydra.job.name: Hydra's own settings cannot be changed; owlfuse runs sweeps itself"
    ),
    "name=${nme}": "name: Interpolation key 'nme' not found; did you mean 'name'?",
    "name=???": "name: needs a value; set it with name=<value>",
    "model={fusion: {layrs: [1]}}": (
        "model.fusion.layrs: no such key; did you mean 'model.fusion.layers'?"
    ),
    "=3": "=3: not of the form key=value",
    "~sed": "Could not delete from config. 'sed' does not exist.",
}


@pytest.mark.parametrize("override", COMMAND_LINE_ERRORS)
@pytest.mark.fast_cases(15)
def test_a_mistake_on_the_command_line_is_one_line_with_the_nearest_right_name(tree, override):
    if COMMAND_LINE_ERRORS[override] is None:
        composed(override)
    else:
        assert message(override) == f"command line: {COMMAND_LINE_ERRORS[override]}"


FILE_ERRORS = {
    "model:\n  fusion:\n    layrs: [1]\n": "model.fusion.layrs: no such key of toyparts.HyperAttention; "
    "did you mean 'layers'? (there are: gate, layers)",
    "trainr: {}\n": "trainr: no such key; did you mean 'trainer'?",
    "model: {adapter: {lm: {}}}\n": "model.adapter.lm: no such key; did you mean 'llm'? "
    "(there are: connector, fusion, llm, vision)",
    "model: {conector: {}}\n": "model.conector: no such key; did you mean 'connector'? "
    "(there are: adapter, compile, connector, fusion, llm, vision)",
    "optim:\n  lr: '1e-3'\n": "optim.lr: '1e-3' is not a number (float)",
    "trainer:\n  max_steps: ${seeds}\n": (
        "trainer.max_steps: Interpolation key 'seeds' not found; did you mean 'seed'?"
    ),
    "data:\n  size: ???\n": "data.size: needs a value; set it with data.size=<value>",
    "trainer: 3\n": "trainer: 3 is not a group of keys",
    "defaults:\n  - override /model/fusion: hyperatention\n": "model/fusion=hyperatention: no such option; "
    "did you mean 'hyperattention'? (there are: concat, hyperattention, modality_adaptive)",
    "defaults:\n  - override /model/fuson: concat\n": (
        "In 'experiments/mine': Could not override 'model/fuson'. No match in the defaults list."
    ),
    "defaults:\n  - override /model/fusion: concat\n  - shapes_owl1\n": (
        "In experiments/mine: Override 'model/fusion : concat' is defined before "
        "'experiments@_global_: shapes_owl1'. Overrides must be at the end of the defaults list"
    ),
    "defaults:\n  - /model/fusion: concat\n": "Multiple values for model/fusion. To override a value use "
    "'override model/fusion: concat'",
    "trainer: {max_steps: '${seed'}\n": (
        "no viable alternative at input '${seed' full_key: trainer.max_steps object_type=dict"
    ),
    "- a\n": (
        "In 'experiments/mine': ConfigTypeError raised while composing config: Cannot merge "
        "DictConfig with ListConfig full_key: object_type=dict"
    ),
    "name: ${oc.env:NOT_SET}\n": (
        "name: KeyError raised while resolving interpolation: \"Environment variable 'NOT_SET' "
        'not found"'
    ),
    "defaults:\n  - shapes_owl4\n": (
        "experiment=shapes_owl4: no such experiment; did you mean 'shapes_owl3'?"
    ),
    "seed: 1\ntrainer:\n  a: b: c\n": "3: not YAML: mapping values are not allowed here",
    "seed: 1\nseed: 2\n": "2: not YAML: found duplicate key seed",
    "seed: [1\n": "2: not YAML: expected ',' or ']', but got '<stream end>'",
}


@pytest.mark.parametrize("text", FILE_ERRORS)
@pytest.mark.fast_cases(5)
def test_a_mistake_in_an_experiments_file_names_the_file(tree, text):
    write(tree, {"experiments/mine.yaml": text})
    separator = ":" if "not YAML" in FILE_ERRORS[text] else ": "
    assert message("experiment=mine") == f"experiments/mine.yaml{separator}{FILE_ERRORS[text]}"


def test_a_mistake_in_a_groups_file_names_the_file(tree):
    write(tree, {"configs/model/fusion/hyperattention.yaml": "_target_: toyparts.HyperAttention\n"})
    place = "configs/model/fusion/hyperattention.yaml"
    assert (
        message()
        == f"{place}: model.fusion.layers: not set, and required by toyparts.HyperAttention"
    )
    write(tree, {"configs/trainer/cpu.yaml": "_target_: toyparts.Trainer\nmax_steps: many\n"})
    assert message("model/fusion=concat") == (
        "configs/trainer/cpu.yaml: trainer.max_steps: 'many' is not a whole number (int)"
    )
    write(tree, {"configs/trainer/cpu.yaml": "defaults:\n  - /optim@o: ???\n"})
    assert message() == (
        "configs/train.yaml: You must specify 'optim@trainer.o', e.g, optim@trainer.o=<OPTION> "
        "Available options: adamw"
    )


def test_a_key_of_an_experiment_that_the_chosen_part_does_not_take_names_the_experiment(tree):
    assert message("experiment=shapes_owl3", "model/fusion=concat") == (
        "experiments/shapes_owl3.yaml: model.fusion.gate: no such key of toyparts.Concat"
    )


def test_a_module_that_lacks_another_is_told_apart_from_one_that_is_not_there(tree, monkeypatch):
    write(tree, {"needy.py": "import not_there\n"})
    monkeypatch.syspath_prepend(str(tree))
    line = (
        "command line: model.llm._target_: needy needs the module 'not_there', which is not "
        "installed"
    )
    assert message("model.llm._target_=needy.Thing") == line


def test_types_are_strict_but_for_what_a_yaml_cannot_say(tree):
    good = [
        {"_target_": "toyparts.AdamW", "lr": 1, "betas": [0, 1.0], "foreach": None},
        {"_target_": "toyparts.Shapes", "folder": "a", "whatever": [1]},
        {"_target_": "toyparts.Trainer", "plugin": {"_target_": "toyparts.Vision", "name": "x"}},
        {"_target_": "toyparts.Full", "parts": "an annotation that cannot be resolved"},
        {"_target_": "toyparts.AdamW", "_partial_": True, "_convert_": "all"},
        {"_target_": "toyparts.Vision", "_args_": ["convnet"]},
        {"_target_": "builtins.dict", "a": 1},
    ]
    check_targets({"list": good})
    bad = {
        "deep": [
            {"_target_": "toyparts.Trainer", "plugin": {"_target_": "toyparts.Vision", "name": 3}}
        ]
    }
    with pytest.raises(
        ConfigError, match=re.escape("configuration: deep.0.plugin.name: 3 is not text (str)")
    ):
        check_targets(bad)


def test_targets_are_checked_without_being_called(tree):
    write(
        tree,
        {"loud.py": "class Loud:\n    def __init__(self, x: int):\n        raise RuntimeError\n"},
    )
    sys.path.insert(0, str(tree))
    try:
        check_targets({"_target_": "loud.Loud", "x": 1})
    finally:
        sys.path.remove(str(tree))


def test_a_configuration_made_by_hand_is_checked_as_well(tree):
    config = OmegaConf.create(OmegaConf.to_container(composed()))
    check(config)
    config.seed = "x"
    with pytest.raises(ConfigError, match="configuration: seed: 'x' is not a whole number"):
        check(config)


def save_run(folder: Path, *overrides: str) -> None:
    folder.mkdir(parents=True)
    OmegaConf.save(composed(*overrides), folder / "config.yaml")


def test_resume_starts_from_the_runs_own_configuration(tree):
    save_run(tree / "runs/shapes_owl1/lr=1,2", "experiment=shapes_owl1", "seed=4")
    write(tree, {"configs/model/vision/convnet.yaml": "broken: ["})
    config = composed(
        "resume=runs/shapes_owl1/lr=1,2", "trainer.max_steps=40", "experiment=shapes_owl1"
    )
    assert (config.seed, config.trainer.max_steps, config.experiment) == (4, 40, "shapes_owl1")
    assert config.resume == "runs/shapes_owl1/lr=1,2"
    assert origin_of(config, "seed") == "runs/shapes_owl1/lr=1,2/config.yaml"
    assert origin_of(config, "trainer.max_steps") == "command line"


def test_a_run_of_before_loses_the_type_of_newton_schulz_with_a_notice(tree, caplog):
    save_run(tree / "runs/x/y", "experiment=shapes_owl1")
    saved = OmegaConf.load(tree / "runs/x/y/config.yaml")
    assert "newton_schulz" not in saved.optim
    with open_dict(saved):
        saved.optim.newton_schulz = "float32"
    OmegaConf.save(saved, tree / "runs/x/y/config.yaml")
    config = composed("resume=runs/x/y")
    assert "newton_schulz" not in config.optim
    assert caplog.messages == ["runs/x/y: optim.newton_schulz is ignored: the device decides"]


KEEPS = "a resumed run keeps its experiment and groups; only keys can change"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model/fusion=concat", f"model/fusion=concat: {KEEPS}"),
        ("data=shapes", f"data=shapes: {KEEPS}"),
        ("experiment=shapes_owl3", f"experiment=shapes_owl3: {KEEPS}"),
        ("trainer.max_stps=3", "trainer.max_stps: no such key; did you mean 'trainer.max_steps'?"),
        ("optim.lr=fast", "optim.lr: 'fast' is not a number (float)"),
    ],
)
def test_resume_refuses_what_would_change_the_run(tree, override, line):
    save_run(tree / "runs/shapes_owl1/a", "experiment=shapes_owl1")
    assert message("resume=runs/shapes_owl1/a", override) == f"command line: {line}"


@pytest.mark.parametrize("override", ["runs=a", "name=runs", "runs=elsewhere"])
def test_a_resumed_run_stays_in_its_folder(tree, override):
    save_run(tree / "runs/shapes_owl1/a", "experiment=shapes_owl1")
    expected = f"{override}: a resumed run stays in its folder, runs/shapes_owl1/a"
    assert message("resume=runs/shapes_owl1/a", override) == f"command line: {expected}"
    assert composed("resume=runs/shapes_owl1/a", "name=a", "runs=runs").seed == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"optim": None}, "None is not a group of keys"), ({}, "not set, and required")],
)
def test_a_run_without_an_optimizer_is_a_line_with_its_file(tree, change, reason):
    save_run(tree / "runs/shapes_owl1/a", "experiment=shapes_owl1")
    file = tree / "runs/shapes_owl1/a/config.yaml"
    saved = OmegaConf.load(file)
    del saved["optim"]
    OmegaConf.save({**saved, **change}, file)
    expected = f"runs/shapes_owl1/a/config.yaml: optim: {reason}"
    assert message("resume=runs/shapes_owl1/a") == expected


def test_a_run_that_is_not_there_names_the_nearest_one(tree):
    assert (
        message("resume=runs/x")
        == "command line: runs/x: not a run: there is no runs/x/config.yaml"
    )
    save_run(tree / "runs/shapes_owl1/trial")
    for wrong in ("runs/shapes_owl1/trail", "trial", "runs/shapes_owl/trial"):
        expected = (
            f"{wrong}: not a run: there is no {wrong}/config.yaml; did you mean "
            "'runs/shapes_owl1/trial'?"
        )
        assert message(f"resume={wrong}") == f"command line: {expected}"
    assert find_run("runs/shapes_owl1/trial") == Path("runs/shapes_owl1/trial")


def cells(*overrides: str) -> list[list[str]]:
    return sweep_cells(list(overrides), config_dir="configs")


def test_a_sweep_is_the_product_of_its_lists(tree):
    assert cells("seed=range(0,2)", "experiment=shapes_owl1,shapes_owl3", "runs=r") == [
        ["seed=0", "experiment=shapes_owl1", "runs=r"],
        ["seed=0", "experiment=shapes_owl3", "runs=r"],
        ["seed=1", "experiment=shapes_owl1", "runs=r"],
        ["seed=1", "experiment=shapes_owl3", "runs=r"],
    ]
    assert cells("experiment=glob('shapes_*')") == [
        ["experiment=shapes_owl1"],
        ["experiment=shapes_owl3"],
    ]
    assert cells("name='a b,c'", "seed=1") == [["name='a b,c'", "seed=1"]]
    assert len(cells("model/fusion=glob(*)", "optim.betas=[0.5,0.6],[0.7,0.8]")) == 6


def test_an_experiments_own_sweep_is_taken_where_the_command_line_does_not_set_the_key(tree):
    assert cells("experiment=ablation/lr") == [
        ["experiment=ablation/lr", "optim.lr=0.1", "seed=1"],
        ["experiment=ablation/lr", "optim.lr=0.2", "seed=1"],
    ]
    assert cells("experiment=ablation/lr", "optim.lr=3", "seed=2") == [
        ["experiment=ablation/lr", "optim.lr=3", "seed=2"]
    ]


def test_a_sweep_over_something_that_does_not_exist_is_an_error_before_any_run(tree):
    with pytest.raises(ConfigError, match="command line: experiment=nope: no such experiment"):
        cells("experiment=shapes_owl1,nope")
    save_run(tree / "runs/a")
    with pytest.raises(ConfigError, match="command line: resume: a sweep cannot be resumed"):
        cells("seed=1,2", "resume=runs/a")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("configs/trainer/ddp.yaml", ["trainer=ddp"]),
        ("configs/trainer/cpu.yaml", []),  # of the defaults
        ("experiments/shapes_owl1.yaml", ["experiment=shapes_owl1"]),
        ("experiments/owl1/recipe.yaml", ["experiment=owl1/instruct"]),
    ],
)
@pytest.mark.fast_cases(2)
def test_a_file_of_the_users_is_not_ignored_for_one_of_the_same_name(
    file, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"configs/model/fusion/mine.yaml": "{}", file: (REPO / file).read_text()})
    compose(words, importing=False)  # a mere copy
    with (tmp_path / file).open("a") as copy:
        copy.write("# edited\n")
    with pytest.raises(ConfigError, match=f"^{file}: {REPO}/{file} .*; rename yours$"):
        compose(words, importing=False)
    compose(["experiment=null", "trainer=gpu"], importing=False)  # it is not asked for
