"""Signatures read from files are those of the classes, and what is wrong with a key is told
alike and at once."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from owlfuse.config import check
from owlfuse.config.check import annotation_of, locate_target, parameters_of
from owlfuse.config.compose import compose
from owlfuse.config.signatures import PACKAGES, read_signature
from owlfuse.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def targets_of(value):
    if isinstance(value, dict):
        yield from [value["_target_"]] if isinstance(value.get("_target_"), str) else []
    for child in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    ):
        yield from targets_of(child)


FILES = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")]
TARGETS = sorted(
    {t for file in FILES for t in targets_of(yaml.safe_load(file.read_text(encoding="utf-8")))}
)
OURS = [target for target in TARGETS if target.split(".")[0] in PACKAGES]


@pytest.mark.parametrize("target", OURS)
def test_the_files_say_what_the_class_says(target):
    stand_in, found = read_signature(target), locate_target(target, "", str)
    assert stand_in is not None, "the check of this target is slow"
    read, real = parameters_of(stand_in), parameters_of(found)
    assert list(read) == list(real)
    for name, parameter in read.items():
        assert parameter.kind is real[name].kind
        assert (parameter.default is inspect.Parameter.empty) == (
            real[name].default is inspect.Parameter.empty
        )
        # a default that is computed, as MLflow's from the environment, may be None in its turn
        assert real[name].default is None or parameter.default is not None
        if parameter.annotation is not inspect.Parameter.empty:
            # a Union's members in another order are the same type
            assert parameter.annotation == annotation_of(real[name], found), name


def test_most_types_are_known_from_the_files():
    parameters = [p for target in OURS for p in parameters_of(read_signature(target)).values()]
    known = [p for p in parameters if p.annotation is not inspect.Parameter.empty]
    assert len(known) > 0.8 * len(parameters)


MISTAKES = [
    "trainr.max_steps=3",
    "trainer.max_step=3",
    "trainer.max_steps=abc",
    "trainer.max_steps=1.5",
    "trainer.precision=bf16-mixt",
    "+trainer.logger=true",
    "model.fusion.gat=fused",
    "model.fusion.gate=fusedd",
    "+model.fusion.gat=fused",
    "optim.lr=abc",
    "optim.betas=[0.9]",
    "evaluation.max_new_tokens=many",
    "evaluation.max_questionz=3",
    "data.batch_size=x",
    "+logger.csv.nam=x",
    "logger.csv.name=x",
    "model/fuson=concat",
    "model/fusion=concatt",
    "experiment=shapes_owl",
]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.fast_cases(3)
def test_errors_are_those_of_the_class_itself(mistake, monkeypatch):
    words = ["experiment=shapes_owl3", mistake]
    with pytest.raises(ConfigError) as quick:
        compose(words)
    monkeypatch.setattr("owlfuse.config.check.read_signature", lambda target: None)
    monkeypatch.setattr("owlfuse.config.hydra.read_signature", lambda target: None)
    with pytest.raises(ConfigError) as full:
        compose(words)
    assert str(quick.value) == str(full.value)


@pytest.mark.slow
def test_mistakes_are_told_without_importing_what_is_heavy():
    script = """
import sys
from owlfuse.config.compose import ConfigError, compose
for mistake in sys.argv[1:]:
    try:
        compose(["experiment=shapes_owl3", mistake])
    except ConfigError as error:
        print(error)
    else:
        raise SystemExit(f"{mistake} is no mistake")
    heavy = {"torch", "lightning", "transformers", "timm"} & set(sys.modules)
    if heavy:
        raise SystemExit(f"{mistake} imports {heavy}")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *MISTAKES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(MISTAKES)


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Linear",
        "owlfuse.no_such.Thing",
        "owlfuse.model.fusion.concat.NoSuch",
        "mine.Part",
        3,
    ],
)
def test_what_the_files_do_not_say_is_left_to_the_class(target):
    assert read_signature(target) is None


def test_right_keys_are_never_refused(monkeypatch):
    """The first pass only ever refuses what the second would: over every experiment, with the
    second pass as it is."""
    called = []
    monkeypatch.setattr(check, "_check_target", lambda *arguments: called.append(arguments))
    for file in (ROOT / "experiments").glob("*.yaml"):
        compose([f"experiment={file.stem}"])
    assert called
