"""`experiments/<name>/ablation.yaml`: factors and their levels, seeds, metrics, a budget.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from owlfuse.config.check import check_arguments
from owlfuse.config.recipes import read_yaml
from owlfuse.core.errors import ConfigError, hint, label

TABLE_COLUMNS = (
    "cell",
    "seeds",
    "trained_parameters",
    "tokens_per_s",
    "peak_memory_bytes",
    "ms_per_generated_token",
)
"""Columns of table.csv beside the factors' and the metrics'."""
Levels = dict[str, str]
"""A level of factors, by the factors' names."""


@dataclass(kw_only=True)
class AblationFile:
    """The keys of the file, as they stand there.

    Args:
        question: what the ablation asks, the title of its report; null: its name.
        base: the experiment that every cell starts from.
        overrides: a list of overrides for every cell.
        factors: what is varied: `{<name>: {<level>: [<overrides>]}}`, or `{<key or group>:
            [<values>]}`; the cells are all combinations of levels.
        leave_out: a list of combinations of levels that are not run, as `[{fusion: owl1, gate:
            static}]`.
        baseline: the levels that differences are taken to, as `{fusion: owl1}`; null: the first of
            each factor.
        seeds: a list of seeds, each of which every cell is run with; null: `[0]`.
        metrics: a list of names as in results.json; the first is the score of the plots.
        budget: `{minutes: 40}` or `{steps: 5000}`: no cell is begun after so long, or that would
            bring all over so many steps.
        paper: a paper's numbers, shown beside ours: `{title, columns, rows: {<level>:
            [<numbers>]}}`.
    """

    question: str | None = None
    base: str
    overrides: str | list[str] | None = None
    factors: dict
    leave_out: list | None = None
    baseline: dict | None = None
    seeds: list[int] | None = None
    metrics: list[str]
    budget: dict | None = None  # Budget
    paper: dict | None = None  # Paper


@dataclass
class Budget:
    """The key `budget`."""

    minutes: float | None = None
    steps: int | None = None


@dataclass
class Paper:
    """The key `paper`: in each row, by level or cell, a number for every column."""

    columns: list
    rows: dict[Any, list[float]]
    title: str = ""


@dataclass
class Factor:
    """What is varied.

    Args:
        key: a configuration key or group that each level sets; None: levels are lists of overrides.
        levels: each level's overrides by its name, in order.
    """

    name: str
    key: str | None
    levels: dict[str, list[str]]


@dataclass
class Ablation:
    """The content of the file, checked by itself; whether its overrides compose shows in
    `grid.make_cells`."""

    name: str
    question: str
    base: str
    factors: list[Factor]
    metrics: list[str]
    """The first one is the score of the plots."""
    seeds: list[int]
    overrides: list[str]
    leave_out: list[Levels]
    baseline: Levels
    """A level of every factor."""
    minutes: float | None
    """After so many minutes of one command no cell is begun."""
    steps: int | None
    """No cell is begun whose steps would bring those of all cells of this command over it."""
    paper: dict[str, Any] | None


def read_ablation(name: str, file: Path) -> Ablation:
    """Return the content of the file. Raises ConfigError: what is wrong with it by itself, in one
    line with the key."""
    location = label(file)
    content = read_content(file)
    expected = {
        "base": "the name of an experiment",
        "factors": "factors, each with its levels",
        "metrics": "a list of names as in results.json",
    }
    for key, description in expected.items():
        # Types do not refuse what is empty.
        if not getattr(content, key):
            raise ConfigError(f"{location}: {key}: expected {description}, and it is empty")

    factors = []
    for key, levels in content.factors.items():
        factors.append(read_factor(str(key), levels, f"{location}: factors.{key}"))
    # Two keys may end alike, as model.vision.layers and model.llm.layers: they keep their full key.
    names = [factor.name for factor in factors]
    for factor in factors:
        if names.count(factor.name) > 1:
            factor.name = factor.key or factor.name
        if factor.name in TABLE_COLUMNS:
            raise ConfigError(
                f"{location}: factors.{factor.name}: the tables have a column of this name; call "
                "the factor otherwise"
            )

    seeds = [0] if content.seeds is None else content.seeds
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(
            f"{location}: seeds: expected a list of different whole numbers, and it is {seeds!r}"
        )
    leave_out = []
    for entry in content.leave_out or []:
        leave_out.append(read_levels(entry, factors, f"{location}: leave_out"))
    budget = read_budget(content.budget or {}, location)
    # The first level of each factor, unless the file names another.
    baseline = {factor.name: next(iter(factor.levels)) for factor in factors}
    baseline |= read_levels(content.baseline or {}, factors, f"{location}: baseline")
    return Ablation(
        name=name,
        # A text of several lines in the file, and a title of one in the report.
        question=" ".join((content.question or name).split()),
        base=content.base,
        factors=factors,
        metrics=content.metrics,
        seeds=seeds,
        overrides=read_overrides(content.overrides or [], f"{location}: overrides"),
        leave_out=leave_out,
        baseline=baseline,
        minutes=budget.minutes,
        steps=budget.steps,
        paper=read_paper(content.paper, location),
    )


def read_content(file: Path) -> AblationFile:
    """Return the file's content. Raises ConfigError for a file that holds no keys, and for an
    unknown, missing or mistyped one."""
    content = read_yaml(file)
    location = label(file)
    if not isinstance(content, dict):
        names = ", ".join(key.name for key in fields(AblationFile))
        raise ConfigError(f"{location}: expected keys ({names})")
    # YAML has keys that are numbers.
    content = {str(key): value for key, value in content.items()}
    check_keys(AblationFile, " of an ablation", "", content, location)
    return AblationFile(**content)


def check_keys(table: type, name: str, path: str, content: dict[str, Any], location: str) -> None:
    """Raises ConfigError for keys that are not a dataclass's fields."""
    check_arguments(table, name, path, content, lambda key: location, builds=False)


def read_factor(key: str, levels: Any, location: str) -> Factor:
    """Return a factor of named levels of overrides, or of a key or group with its values."""
    if isinstance(levels, dict) and levels:
        overrides_by_level = {}
        for name, overrides in levels.items():
            overrides_by_level[level_name(name)] = read_overrides(overrides, f"{location}.{name}")
        return Factor(key, None, overrides_by_level)
    if not isinstance(levels, list) or not levels:
        raise ConfigError(
            f"{location}: expected levels, each a list of overrides, or a list of values, and it "
            f"is {levels!r}"
        )
    # Two values with one name, as 1 and "1", would be one cell.
    values = {level_name(value): [f"{key}={override_literal(value)}"] for value in levels}
    if len(values) != len(levels):
        raise ConfigError(f"{location}: a value stands twice: {levels!r}")
    return Factor(re.split(r"[./@]", key)[-1], key, values)


def read_overrides(overrides: Any, location: str) -> list[str]:
    """Return overrides as on the command line, a single one as a list of one."""
    if isinstance(overrides, str):
        return [overrides]
    is_words = isinstance(overrides, list) and all(isinstance(word, str) for word in overrides)
    if not is_words:
        raise ConfigError(
            f"{location}: expected a list of overrides, as [model/fusion=concat], and it is "
            f"{overrides!r}"
        )
    return overrides


def read_levels(entry: Any, factors: list[Factor], location: str) -> Levels:
    """Return levels such as {fusion: owl1} by the factors' names.

    Raises ConfigError for a factor or level that does not exist.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"{location}: expected levels, as {{fusion: owl1}}, and it is {entry!r}")
    # A factor is called by its name or by its full key; a name goes before a key.
    by_name = {factor.key: factor for factor in factors if factor.key}
    by_name |= {factor.name: factor for factor in factors}
    levels: Levels = {}
    for name, value in entry.items():
        if name not in by_name:
            names = [factor.name for factor in factors]
            raise ConfigError(f"{location}.{name}: no such factor{hint(str(name), names)}")
        factor, level = by_name[name], level_name(value)
        if level not in factor.levels:
            raise ConfigError(
                f"{location}.{name}: {level}: no such level{hint(level, factor.levels)}"
            )
        levels[factor.name] = level
    return levels


def read_budget(content: dict[str, Any], location: str) -> Budget:
    """Return the key `budget`. Raises ConfigError for one that no cell fits into."""
    check_keys(Budget, " of a budget", "budget", content, location)
    for key, value in content.items():
        if value is not None and value <= 0:
            raise ConfigError(
                f"{location}: budget.{key}: expected a positive number, and it is {value!r}"
            )
    return Budget(**content)


def read_paper(content: dict[str, Any] | None, location: str) -> dict[str, Any] | None:
    """Return the key `paper`, its levels by their names. Raises ConfigError for a row that does not
    fit the columns."""
    if content is None:
        return None
    check_keys(Paper, " of a paper", "paper", content, location)
    paper = Paper(**content)
    for name, row in paper.rows.items():
        if len(row) != len(paper.columns):
            raise ConfigError(
                f"{location}: paper.rows.{name}: expected a number for each of the "
                f"{len(paper.columns)} columns, and it is {row!r}"
            )
    return {
        "title": paper.title,
        "columns": [str(column) for column in paper.columns],
        "rows": {level_name(name): row for name, row in paper.rows.items()},
    }


def level_name(value: Any) -> str:
    """Return the name of a level: `true`, `null`, `1e-3` as in the file, a list without spaces."""
    return value if isinstance(value, str) else override_literal(value)


def override_literal(value: Any) -> str:
    """Return a value in the grammar of overrides."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(override_literal, value))}]"
    if isinstance(value, dict):
        items = [f"{key}:{override_literal(child)}" for key, child in value.items()]
        return "{" + ",".join(items) + "}"
    # What these characters make up needs no quotes in Hydra's grammar, which knows ASCII alone.
    if isinstance(value, int | float) or re.fullmatch(r"[\w./+-]+", value, re.ASCII):
        return str(value)
    return "'" + value.replace("'", "\\'") + "'"
