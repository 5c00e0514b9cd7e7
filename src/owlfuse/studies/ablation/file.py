"""`experiments/<name>/ablation.yaml`: factors and their levels, seeds, metrics, a budget.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    leave_out: list[dict[str, str]] = field(default_factory=list)
    baseline: dict[str, str] = field(default_factory=dict)
    """A level of every factor."""
    minutes: float | None = None
    """After so many minutes of one command no cell is begun."""
    steps: int | None = None
    """No cell is begun whose steps would bring those of all cells of this command over it."""
    paper: dict[str, Any] | None = None


def read_ablation(name: str, file: Path) -> Ablation:
    """Raises ConfigError: what is wrong with the file by itself, in one line with the key."""
    content = read_yaml(file)
    place = label(file)
    if unknown := [key for key in content if key not in KEYS]:
        raise ConfigError(
            f"{place}: {unknown[0]}: no such key of an ablation{hint(unknown[0], KEYS)}"
        )
    for key, kind, what in (
        ("base", str, "the name of an experiment"),
        ("factors", dict, "factors, each with its levels"),
    ):
        if not isinstance(content.get(key), kind) or not content[key]:
            raise ConfigError(f"{place}: {key}: expected {what}, and it is {content.get(key)!r}")
    factors = [
        read_factor(str(key), levels, f"{place}: factors.{key}")
        for key, levels in content["factors"].items()
    ]
    for factor in factors:
        if [other.name for other in factors].count(factor.name) > 1:
            factor.name = factor.key or factor.name
    seeds = content.get("seeds", [0])
    metrics: Any = content.get("metrics")
    if not is_list(seeds, int) or len(set(seeds)) != len(seeds):
        raise ConfigError(
            f"{place}: seeds: expected a list of different whole numbers, and it is {seeds!r}"
        )
    if not is_list(metrics, str):
        raise ConfigError(
            f"{place}: metrics: expected a list of names as in results.json, and it is {metrics!r}"
        )
    budget = read_budget(content.get("budget"), place)
    baseline = read_levels(content.get("baseline") or {}, factors, f"{place}: baseline")
    leave_out = content.get("leave_out") or []
    if not isinstance(leave_out, list):
        raise ConfigError(
            f"{place}: leave_out: expected a list of combinations, as "
            "[{fusion: owl1, gate: static}]"
        )
    return Ablation(
        name=name,
        question=" ".join(str(content.get("question") or name).split()),
        base=content["base"],
        factors=factors,
        metrics=metrics,
        seeds=seeds,
        overrides=read_overrides(content.get("overrides") or [], f"{place}: overrides"),
        leave_out=[read_levels(entry, factors, f"{place}: leave_out") for entry in leave_out],
        baseline={
            factor.name: baseline.get(factor.name, next(iter(factor.levels))) for factor in factors
        },
        minutes=budget.get("minutes"),
        steps=budget.get("steps"),
        paper=read_paper(content.get("paper"), place),
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """The file's content. Raises ConfigError with the line for what is no YAML."""
    import yaml
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(
            f"{label(file)}:{line}: not YAML: {error.problem or error.context}"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{label(file)}: expected keys ({', '.join(KEYS)})")
    return {str(key): value for key, value in content.items()}


def read_factor(key: str, levels: Any, place: str) -> Factor:
    """A name with levels of overrides, or a key or group with its values."""
    if isinstance(levels, dict) and levels:
        named = {
            level_name(name): read_overrides(words, f"{place}.{name}")
            for name, words in levels.items()
        }
        return Factor(key, None, named)
    if not isinstance(levels, list) or not levels:
        raise ConfigError(
            f"{place}: expected levels, each a list of overrides, or a list of values, and it is "
            f"{levels!r}"
        )
    values = {level_name(value): [f"{key}={written(value)}"] for value in levels}
    if len(values) != len(levels):
        raise ConfigError(f"{place}: a value stands twice: {levels!r}")
    return Factor(re.split(r"[./@]", key)[-1], key, values)


def read_overrides(words: Any, place: str) -> list[str]:
    """Overrides as on the command line."""
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(
            f"{place}: expected a list of overrides, as [model/fusion=concat], and it is {words!r}"
        )
    return words


def read_levels(entry: Any, factors: list[Factor], place: str) -> dict[str, str]:
    """{fusion: owl1} with the factors' own names.

    Raises ConfigError for a factor or level that there is not.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: expected levels, as {{fusion: owl1}}, and it is {entry!r}")
    by_name = {name: factor for factor in factors for name in (factor.key, factor.name) if name}
    found = {}
    for name, level in entry.items():
        if name not in by_name:
            raise ConfigError(
                f"{place}.{name}: no such "
                f"factor{hint(str(name), [factor.name for factor in factors])}"
            )
        factor, level = by_name[name], level_name(level)
        if level not in factor.levels:
            raise ConfigError(f"{place}.{name}: {level}: no such level{hint(level, factor.levels)}")
        found[factor.name] = level
    return found


def read_budget(budget: Any, place: str) -> dict[str, Any]:
    """{minutes, steps}, both optional."""
    budget = {} if budget is None else budget
    if not isinstance(budget, dict) or set(budget) - {"minutes", "steps"}:
        raise ConfigError(
            f"{place}: budget: expected minutes and steps, as {{minutes: 40}}, and it is {budget!r}"
        )
    for key, value in budget.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(
                f"{place}: budget.{key}: expected a positive number, and it is {value!r}"
            )
    return budget


def read_paper(paper: Any, place: str) -> dict[str, Any] | None:
    """{title, columns, rows}: a row of numbers for levels or cells of ours."""
    if paper is None:
        return None
    whole = (
        isinstance(paper, dict)
        and isinstance(paper.get("columns"), list)
        and isinstance(paper.get("rows"), dict)
    )
    if not whole or any(
        not is_list(row, int | float) or len(row) != len(paper["columns"])
        for row in paper["rows"].values()
    ):
        raise ConfigError(
            f"{place}: paper: expected a title, columns, and rows of a number for each column by "
            "level"
        )
    rows = {level_name(name): row for name, row in paper["rows"].items()}
    return {
        "title": str(paper.get("title", "")),
        "columns": [str(column) for column in paper["columns"]],
        "rows": rows,
    }


def is_list(value: Any, kind: Any) -> bool:
    """A list of at least one of a kind, of which a truth value is none."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    )


def level_name(value: Any) -> str:
    """How a level is called: `true`, `null`, `1e-3` as in the file, a list without spaces."""
    return value if isinstance(value, str) else written(value)


def written(value: Any) -> str:
    """A value in the grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(child)}" for key, child in value.items()) + "}"
    if isinstance(value, int | float) or re.fullmatch(r"[\w./+-]+", value):
        return str(value)
    return "'" + value.replace("'", "\\'") + "'"
