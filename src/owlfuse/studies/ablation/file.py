"""`experiments/<name>/ablation.yaml`: factors and their levels, seeds, metrics, a budget.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owlfuse.config.recipes import read_yaml
from owlfuse.core.errors import ConfigError, hint, label

KEYS = {
    "question": "what the ablation asks, the title of its report",
    "base": "the experiment that every cell starts from",
    "overrides": "a list of overrides for every cell",
    "factors": "what is varied: `{<name>: {<level>: [<overrides>]}}`, or `{<key or group>: "
    "[<values>]}`; the cells are all "
    "combinations of levels",
    "leave_out": (
        "a list of combinations of levels that are not run, as `[{fusion: owl1, gate: static}]`"
    ),
    "baseline": (
        "the levels that differences are taken to, as `{fusion: owl1}`; by default the first "
        "of each factor"
    ),
    "seeds": "a list of seeds, each of which every cell is run with; by default `[0]`",
    "metrics": "a list of names as in results.json; the first is the score of the plots",
    "budget": (
        "`{minutes: 40}` or `{steps: 5000}`: no cell is begun after so long, or that would "
        "bring all over so many steps"
    ),
    "paper": (
        "a paper's numbers, shown beside ours: `{title, columns, rows: {<level>: [<numbers>]}}`"
    ),
}
"""The keys of the file and what they mean."""


Levels = dict[str, str]
"""A level of factors, by the factors' names."""


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
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: list[str] = field(default_factory=list)
    leave_out: list[Levels] = field(default_factory=list)
    baseline: Levels = field(default_factory=dict)
    """A level of every factor."""
    minutes: float | None = None
    """After so many minutes of one command no cell is begun."""
    steps: int | None = None
    """No cell is begun whose steps would bring those of all cells of this command over it."""
    paper: dict[str, Any] | None = None


def read_ablation(name: str, file: Path) -> Ablation:
    """Return the content of the file. Raises ConfigError: what is wrong with it by itself, in one
    line with the key."""
    content = read_keys(file)
    location = label(file)
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{location}: {key}: no such key of an ablation{hint(key, KEYS)}")
    require(content, "base", str, "the name of an experiment", location)
    require(content, "factors", dict, "factors, each with its levels", location)

    factors = []
    for key, levels in content["factors"].items():
        factors.append(read_factor(str(key), levels, f"{location}: factors.{key}"))
    # Two keys may end alike, as model.vision.layers and model.llm.layers: they keep their full key.
    names = [factor.name for factor in factors]
    for factor in factors:
        if names.count(factor.name) > 1:
            factor.name = factor.key or factor.name

    seeds = content.get("seeds", [0])
    if not is_list(seeds, int) or len(set(seeds)) != len(seeds):
        raise ConfigError(
            f"{location}: seeds: expected a list of different whole numbers, and it is {seeds!r}"
        )
    metrics: Any = content.get("metrics")
    if not is_list(metrics, str):
        raise ConfigError(
            f"{location}: metrics: expected a list of names as in results.json, and it is "
            f"{metrics!r}"
        )
    leave_out = content.get("leave_out") or []
    if not isinstance(leave_out, list):
        raise ConfigError(
            f"{location}: leave_out: expected a list of combinations, as "
            "[{fusion: owl1, gate: static}]"
        )
    budget = read_budget(content.get("budget"), location)
    # The first level of each factor, unless the file names another.
    baseline = {factor.name: next(iter(factor.levels)) for factor in factors}
    baseline |= read_levels(content.get("baseline") or {}, factors, f"{location}: baseline")
    return Ablation(
        name=name,
        # A text of several lines in the file, and a title of one in the report.
        question=" ".join(str(content.get("question") or name).split()),
        base=content["base"],
        factors=factors,
        metrics=metrics,
        seeds=seeds,
        overrides=read_overrides(content.get("overrides") or [], f"{location}: overrides"),
        leave_out=[read_levels(entry, factors, f"{location}: leave_out") for entry in leave_out],
        baseline=baseline,
        minutes=budget.get("minutes"),
        steps=budget.get("steps"),
        paper=read_paper(content.get("paper"), location),
    )


def require(content: dict[str, Any], key: str, kind: type, expected: str, location: str) -> None:
    """Raises ConfigError for a key that is missing, empty or of another kind."""
    value = content.get(key)
    if not isinstance(value, kind) or not value:
        raise ConfigError(f"{location}: {key}: expected {expected}, and it is {value!r}")


def read_keys(file: Path) -> dict[str, Any]:
    """Return the file's content. Raises ConfigError for a file that holds no keys."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{label(file)}: expected keys ({', '.join(KEYS)})")
    # YAML has keys that are numbers.
    return {str(key): value for key, value in content.items()}


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


def read_budget(budget: Any, location: str) -> dict[str, Any]:
    """Return {minutes, steps}, both optional."""
    budget = {} if budget is None else budget
    if not isinstance(budget, dict) or set(budget) - {"minutes", "steps"}:
        raise ConfigError(
            f"{location}: budget: expected minutes and steps, as {{minutes: 40}}, and it is "
            f"{budget!r}"
        )
    for key, value in budget.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(
                f"{location}: budget.{key}: expected a positive number, and it is {value!r}"
            )
    return budget


def read_paper(paper: Any, location: str) -> dict[str, Any] | None:
    """Return {title, columns, rows}: a row of numbers for levels or cells of ours."""
    if paper is None:
        return None
    if not is_paper(paper):
        raise ConfigError(
            f"{location}: paper: expected a title, columns, and rows of a number for each column "
            "by level"
        )
    return {
        "title": str(paper.get("title", "")),
        "columns": [str(column) for column in paper["columns"]],
        "rows": {level_name(name): row for name, row in paper["rows"].items()},
    }


def is_paper(paper: Any) -> bool:
    """Return whether it has columns, and in every row a number for each of them."""
    if not isinstance(paper, dict):
        return False
    columns, rows = paper.get("columns"), paper.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, dict):
        return False
    return all(is_list(row, int | float) and len(row) == len(columns) for row in rows.values())


def is_list(value: Any, kind: Any) -> bool:
    """Return whether it is a list of at least one of a kind, of which a truth value is none."""
    if not isinstance(value, list) or not value:
        return False
    # True is an int to Python.
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def level_name(value: Any) -> str:
    """Return the name of a level: `true`, `null`, `1e-3` as in the file, a list without spaces."""
    return value if isinstance(value, str) else override_literal(value)


def override_literal(value: Any) -> str:
    """Return a value in the grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(override_literal, value))}]"
    if isinstance(value, dict):
        items = [f"{key}:{override_literal(child)}" for key, child in value.items()]
        return "{" + ",".join(items) + "}"
    # What these characters make up needs no quotes in Hydra's grammar.
    if isinstance(value, int | float) or re.fullmatch(r"[\w./+-]+", value):
        return str(value)
    return "'" + value.replace("'", "\\'") + "'"
