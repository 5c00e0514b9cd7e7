"""The command line: what is imported for help, exit codes by real processes, the sweep's order
and its table."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from owlfuse import __main__
from owlfuse.config import compose
from owlfuse.config.folders import find_folders
from owlfuse.core.errors import ConfigError

REPO = Path(__file__).resolve().parents[1]
HEAVY = (
    "hydra",
    "omegaconf",
    "torch",
    "lightning",
    "transformers",
    "pydantic",
    "rich",
    "yaml",
    "numpy",
)


def owlfuse(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "owlfuse", *argv], cwd=cwd, capture_output=True, text=True
    )


def one_line(result: subprocess.CompletedProcess) -> str:
    assert result.stdout == ""
    assert result.stderr.startswith("owlfuse: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("owlfuse: error: ").strip()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["recipe", "--help"],
        ["ablate", "--help"],
        ["data", "shapes", "--help"],
        ["tran"],
    ],
)
def test_help_imports_nothing_heavy(argv, tmp_path):
    code = f"""
import sys
from owlfuse.__main__ import main
try:
    main({argv!r})
except SystemExit:
    pass
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "heavy: []"


MISTAKES = {
    "train optim.lrr=1": "optim.lrr: no such key",
    "train evaluation=null evaluation.max_questions=2": (
        "evaluation.max_questions=2: evaluation is null, so it has no keys"
    ),
    "train +logger.csv.name=x logger=null": "+logger.csv.name=x: logger is null, so it has no keys",
    "train -m optim.lrr=1,2": "optim.lrr: no such key",
    "recipe nope": "recipe nope: no such recipe",
    "recipe owl1 optim.lrr=1": "optim.lrr: no such key",
    "recipe owl1 trainer.max_steps=x": "trainer.max_steps: 'x' is not a whole number",
    "recipe owl1 stages.instruct.optim.lrr=1": "optim.lrr: no such key",
    "recipe owl1 stages.nope.seed=1": "no stage nope",
    "ablate nope": "ablate nope: no such ablation",
    "ablate fusion optim.lrr=1": "optim.lrr: no such key",
    "ablate fusion jobs=x": "jobs: 'x' is not a whole number",
    "ablate fusion evaluation=null": (
        "evaluation.max_questions=300: evaluation is null, so it has no keys"
    ),
    "ablate text_ratio evaluation=null": (
        "evaluation is null, and the ablation reports val/exact_match"
    ),
    "report nope": "report nope: there is no runs/nope/ablation.json",
    "report nope base=x": "base=x: report takes a name or a folder",
    "eval nope": "nope: not a run",
    "eval nope task=pope": "command line: nope: no model: it is not a folder",
    "eval MODEL task=nope": "task=nope: no such option",
    "eval MODEL task=pope task.file=x batch_sise=2": "batch_sise",
    "eval MODEL task=pope task.file=x batch_size=x": "batch_size: 'x' is not a whole number",
    "export nope out": "nope: no model: it is not a folder",
    "export MODEL out merged=true": "merged=true: not an option",
    "export MODEL out max_shard_size=5": "max_shard_size=5: expected a number of KB",
    "import nope out": "nope is no folder",
    "import nope out merge=true": "merge=true: not an option",
    "chat nope": "nope: no model: it is not a folder",
    "chat MODEL which=best": "which=best: an exported folder has no checkpoints",
    "chat MODEL --image nope.png why": "--image nope.png: there is no such file",
    "chat MODEL why --max-new-tokens 0": "--max-new-tokens 0: expected at least 1",
    "chat MODEL why --temperature -1": "--temperature -1.0: expected a number of at least 0",
    "chat MODEL --explain nope/a.png why": "there is no folder nope",
    "mixture optim.lrr=1": "optim.lrr: no such key",
    "data shapes out x": "x: not an argument of data",
    "config optim.lrr=1": "optim.lrr: no such key",
}
"""Commands with a mistake, and what is said of it.

MODEL is an exported folder, of which nothing but its kind is read.
"""


QUICK = [
    "recipe owl1 optim.lrr=1",
    "report nope",
    "export nope out",
    "chat nope",
    "eval nope task=pope",
]


@pytest.mark.parametrize(
    "lines", [QUICK, pytest.param([*MISTAKES], marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_a_mistake_of_any_command_is_told_before_a_heavy_import(lines, tmp_path):
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL/config.json").write_text('{"model_type": "owlfuse"}')
    code = f"""
import contextlib, io, json, sys
from owlfuse.__main__ import main
said = {{}}
for line in {lines!r}:
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            main(line.split())
        except SystemExit:
            pass
    heavy = [name for name in ("torch", "transformers", "lightning", "timm", "peft", "PIL") if name in sys.modules]
    said[line] = error.getvalue(), heavy
print(json.dumps(said))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said = json.loads(result.stdout)
    for line in lines:
        error, heavy = said[line]
        assert error.startswith("owlfuse: error: "), line
        assert error.count("\n") == 1, line
        assert MISTAKES[line] in error, line
        assert heavy == [], line


def test_every_command_has_a_mistake_in_the_table():
    assert {line.split()[0] for line in MISTAKES} == set(__main__.COMMANDS) - {
        "demo",
        "completion",
    }  # demo asks for its extra first


def test_help_of_train_lists_experiments_and_options_of_the_working_folder(
    tmp_path, monkeypatch, capsys
):
    for name in ("configs/model/connector/mine.yaml", "experiments/sweep/one.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        __main__.main(["train", "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("sweep/one" in line for line in lines)
    assert any(line.split()[:1] == ["model/connector"] and "mine" in line for line in lines)


def test_help_tells_the_exit_codes(tmp_path):
    result = owlfuse("--help", cwd=tmp_path)
    assert result.returncode == 0
    for code in ("0", "1", "2", "130"):
        assert f"\n  {code:<5}" in result.stdout


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["trian"],
            "trian: no such command; did you mean 'train'? (there are: ablate, chat, completion, "
            "config, data, demo, eval, export, import, mixture, recipe, report, train)",
        ),
        (
            ["zzz"],
            "zzz: no such command (there are: ablate, chat, completion, config, data, demo, eval, "
            "export, import, mixture, recipe, report, train)",
        ),
        (
            ["train", "--mutlirun"],
            ("command line: --mutlirun: no such option of train; see owlfuse train --help"),
        ),
        (
            ["train", "experiment=mine1"],
            ("command line: experiment=mine1: no such experiment; did you mean 'mine'?"),
        ),
        (
            ["train", "mine"],
            ("command line: mine: not of the form key=value; did you mean experiment=mine?"),
        ),
        (
            ["train", "resume=nowhere"],
            ("command line: nowhere: not a run: there is no nowhere/config.yaml"),
        ),
        (
            ["train", "-m", "experiment=mine,mine1"],
            ("command line: experiment=mine1: no such experiment; did you mean 'mine'?"),
        ),
        (
            ["config", "seed=[1,"],
            "command line: seed=[1,: no viable alternative at input '[1,' See "
            "https://hydra.cc/docs/1.2/advanced/override_grammar/basic for details; "
            "a value with special characters needs quotes: key='\"a=b\"'",
        ),
        (["eval", "nowhere"], "command line: nowhere: not a run: there is no nowhere/config.yaml"),
        (["eval", "seed=1"], "command line: name the run's folder: owlfuse eval RUN [overrides]"),
        (
            ["data", "shapes", "d", "--pictures", "many"],
            ("argument --pictures: invalid int value: 'many'"),
        ),
        (["data", "shapes", "d", "e"], "command line: e: not an argument of data; see its --help"),
    ],
)
@pytest.mark.fast_cases(4)
def test_a_mistake_is_one_line_and_exit_code_2(argv, line, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.yaml").touch()
    result = owlfuse(*argv, cwd=tmp_path)
    assert (one_line(result), result.returncode) == (line, 2)


class Recorder:
    """Stands for owlfuse.training.train and owlfuse.evaluation.validation: keeps what it is
    called with, writes results."""

    def __init__(self, folder: Path):
        self.folder, self.configs, self.evaluated, self.error = folder, [], [], None

    def run(self, composed):
        if self.error is not None and len(self.configs) == 1:
            raise self.error
        self.configs.append(composed)
        run = self.folder / f"run{len(self.configs)}"
        run.mkdir()
        metrics = {"accuracy": 0.25 * len(self.configs), "note": "text"}
        (run / "results.json").write_text(json.dumps({"metrics": metrics}))
        return run

    def evaluate_run(self, folder, overrides):
        self.evaluated.append((folder, overrides))


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """The commands with the composition cut short:

    `seed` alone is read, and seed=9 does not compose.
    """

    def compose_seed(overrides):
        if "seed=9" in overrides:
            raise ConfigError("command line: seed: 9 is refused")
        return OmegaConf.create({"overrides": overrides})

    made = Recorder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(compose, "compose", compose_seed)
    monkeypatch.setattr(
        compose, "sweep_cells", lambda overrides: compose._product(overrides, find_folders())
    )
    checks = SimpleNamespace(check_machine=lambda config: None)
    for name, stand_in in {
        "owlfuse.training.train": SimpleNamespace(run=made.run),
        "owlfuse.evaluation.validation": made,
        "owlfuse.training.machine_checks": checks,
    }.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.setattr(name, stand_in, raising=False)
    return made


@pytest.mark.parametrize("by_module", [True, False])
def test_a_module_of_the_working_folder_is_not_run_by_itself(by_module, tmp_path):
    (tmp_path / "hydra.py").write_text("print('code of the working folder')")
    command = (
        [sys.executable, "-m", "owlfuse"]
        if by_module
        else [str(Path(sys.executable).with_name("owlfuse"))]
    )
    result = subprocess.run(
        [*command, "recipe", "nope"], cwd=tmp_path, capture_output=True, text=True
    )
    assert one_line(result).startswith("command line: recipe nope: no such recipe")


def test_overrides_may_stand_anywhere_on_the_line(recorder):
    assert __main__.main(["train", "a=1", "-m", "b=2", "c=3"]) == 0
    assert recorder.configs == [{"overrides": ["a=1", "b=2", "c=3"]}]


def test_a_sweep_runs_every_cell_and_prints_a_table(recorder, capsys):
    assert __main__.main(["train", "-m", "seed=1,2", "runs=r"]) == 0
    assert [c.overrides for c in recorder.configs] == [["seed=1", "runs=r"], ["seed=2", "runs=r"]]
    out = capsys.readouterr().out
    rows = [line.split("│") for line in out.splitlines() if "seed=" in line]
    assert [[cell.strip() for cell in row[1:-1]] for row in rows] == [
        ["seed=1", str(recorder.folder / "run1"), "0.25"],
        ["seed=2", str(recorder.folder / "run2"), "0.5"],
    ]
    assert "2 of 2 runs" in out
    assert "note" not in out


def test_no_cell_is_trained_where_one_does_not_compose(recorder, capsys):
    assert __main__.main(["train", "-m", "seed=1,9"]) == 2
    assert recorder.configs == []
    assert capsys.readouterr().err == "owlfuse: error: command line: seed: 9 is refused\n"


def test_a_sweep_that_fails_still_prints_the_table_of_what_is_done(recorder, capsys):
    recorder.error = RuntimeError("diverged")
    with pytest.raises(RuntimeError, match="diverged"):
        __main__.main(["train", "-m", "seed=1,2,3"])
    assert "1 of 3 runs" in capsys.readouterr().out


def test_interruption_is_exit_code_130_and_data_errors_are_1(recorder, capsys):
    from owlfuse.core.errors import DataError
    from owlfuse.core.packages import MissingPackage

    def exit_code(error: BaseException) -> int:
        recorder.configs[:], recorder.error = [None], error
        return __main__.main(["train", "seed=1"])

    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(FileNotFoundError("no\nfile")) == 1
    assert exit_code(DataError("sample x is wrong")) == 1
    # as torch writes the error of a data worker
    caught = (
        "Caught MissingPackage in DataLoader worker process 0.\n"
        "Original Traceback (most recent call last):\n  File ...\n"
        "owlfuse.core.packages.MissingPackage: pip install 'owlfuse[video]'\n"
    )
    assert exit_code(MissingPackage(caught)) == 1
    assert capsys.readouterr().err.splitlines() == [
        "owlfuse: interrupted",
        "owlfuse: error: no file",
        "owlfuse: error: sample x is wrong",
        "owlfuse: error: pip install 'owlfuse[video]'",
    ]
    with pytest.raises(ValueError, match="a fault"):
        exit_code(ValueError("a fault"))


@pytest.mark.parametrize("command", ["export", "import"])
def test_sigterm_ends_the_writing_of_a_model_as_ctrl_c_does(command, tmp_path, monkeypatch, capsys):
    from owlfuse.artifacts import commands
    from owlfuse.core.files import atomic_directory

    def write(source, out, words):
        with atomic_directory(out) as folder:
            (folder / "model.safetensors").write_bytes(b"0" * 1000)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(commands, f"{command}_command", write)
    assert __main__.main([command, "a", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "owlfuse: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_eval_takes_a_run_and_overrides_in_any_order(recorder):
    run = recorder.folder / "lr=1"
    run.mkdir()
    (run / "config.yaml").touch()
    assert __main__.main(["eval", "seed=1", str(run), "name=x"]) == 0
    assert recorder.evaluated == [(str(run), ["seed=1", "name=x"])]


def test_data_shapes_passes_its_arguments_on(recorder, monkeypatch, capsys):
    calls = []

    def write_shapes(**arguments):
        calls.append(arguments)
        if arguments["train_pictures"] < 1:
            raise ValueError("train_pictures is 0:\nat least 1")

    monkeypatch.setitem(
        sys.modules, "owlfuse.data.shapes.write", SimpleNamespace(write_shapes=write_shapes)
    )
    assert __main__.main(["data", "shapes", "d", "--seed", "3", "--pictures", "40"]) == 0
    assert calls == [{"folder": "d", "seed": 3, "train_pictures": 40}]
    with pytest.raises(SystemExit) as caught:
        __main__.main(["data", "shapes", "d", "--pictures", "0"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "owlfuse: error: train_pictures is 0: at least 1\n"


@pytest.mark.skipif(
    not (REPO / "configs/trainer").is_dir(), reason="the groups are not written yet"
)
@pytest.mark.slow
def test_config_prints_the_composed_configuration_as_yaml_from_any_folder(tmp_path):
    result = owlfuse("config", "seed=3", "name=x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = OmegaConf.create(result.stdout)
    assert (printed.seed, printed.name) == (3, "x")
    assert set(printed.model) == {"vision", "connector", "fusion", "llm", "adapter", "compile"}
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_trusted_is_imported_from_the_working_folder(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "parts_of_mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert __main__.main(["--trust", "parts_of", "eval"]) == 2
    message = (
        "owlfuse: error: command line: --trust parts_of: no such module in this folder or "
        "installed\n"
    )
    assert capsys.readouterr().err == message
    # a name below a module that is a file
    assert __main__.main(["--trust", "parts_of_mine.nosuch.mean", "eval"]) == 2
    assert "--trust parts_of_mine.nosuch.mean: no such module" in capsys.readouterr().err
    del sys.modules["parts_of_mine"]
    assert __main__.main(["eval"]) == 2
    assert "parts_of_mine" not in sys.modules
    __main__.main(["--trust", "parts_of_mine", "eval"])
    assert sys.modules.pop("parts_of_mine").__file__ == str(tmp_path / "parts_of_mine.py")
