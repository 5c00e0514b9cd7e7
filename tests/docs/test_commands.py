"""Every command that README and docs show is one that owlfuse takes."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers import REPO
from owlfuse.__main__ import make_parser
from owlfuse.config.compose import compose, compose_root, sweep_cells
from owlfuse.config.folders import find_folders
from owlfuse.config.hydra import read_overrides
from owlfuse.studies.ablation.file import read_ablation
from owlfuse.studies.ablation.run import split_words
from pages import PAGES, commands, files

SHOWN = sorted({tuple(words) for page in PAGES for words in commands(page)})
TAKES_OVERRIDES = ("train", "config", "mixture", "recipe", "ablate")


@pytest.fixture
def shown_files(examples):
    """The working folder with every file that a page writes or shows."""
    for page in PAGES:
        for path, content in files(page):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(content)


def overrides_of(arguments):
    """The overrides of a composition that a command asks for; None of one that composes nothing."""
    words = list(getattr(arguments, "overrides", []))
    if arguments.command == "eval":
        return None if len(words) == 1 else words[1:]
    if arguments.command == "mixture":
        return [word for word in words if not word.startswith(("steps=", "out="))]
    if arguments.command == "recipe":
        assert arguments.recipe in find_folders().recipe_names
        stage = find_folders().stage_names(arguments.recipe)[0]
        return [
            f"experiment={arguments.recipe}/{stage}",
            *(w for w in words if not w.startswith("stages.")),
        ]
    if arguments.command == "ablate":
        ablation = read_ablation(arguments.ablation, find_folders().ablation(arguments.ablation))
        levels = [next(iter(factor.levels.values())) for factor in ablation.factors]
        _, overrides = split_words(words)
        return [
            f"experiment={ablation.base}",
            *ablation.overrides,
            *(w for level in levels for w in level),
            *overrides,
        ]
    return words if arguments.command in TAKES_OVERRIDES else None


def parsed(words):
    """The arguments of an `owlfuse` command, as `main` reads them."""
    arguments, rest = make_parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")], words
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    return arguments


def test_every_command_parses_and_names_options_that_there_are(shown_files):
    assert len(SHOWN) > 50
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *words in SHOWN:
        if program == "make":
            assert words[0] in targets, words
        elif (
            overrides := overrides_of(arguments := parsed(words))
        ) is not None and arguments.command != "eval":
            lines = [word for word in overrides if not word.startswith("resume=")]
            read_overrides(lines, find_folders(), sweep=getattr(arguments, "multirun", False))


def composed(words):
    """What a command composes, composed."""
    arguments = parsed(words)
    overrides = overrides_of(arguments)
    if overrides is None:
        return
    for run in [Path(word[7:]) for word in overrides if word.startswith("resume=")]:
        run.mkdir(parents=True)
        OmegaConf.save(compose(["experiment=shapes_owl3"]), run / "config.yaml")
    if arguments.command == "eval":
        compose_root("eval", overrides)
        return
    for cell in sweep_cells(overrides) if getattr(arguments, "multirun", False) else [overrides]:
        compose(cell)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [words for program, *words in SHOWN if program == "owlfuse"], ids=" ".join
)
def test_the_command_composes(shown_files, words):
    composed(words)


def test_the_commands_of_the_readme_compose(shown_files):
    for _, *words in [words for words in commands(REPO / "README.md") if words[0] == "owlfuse"]:
        composed(words)
