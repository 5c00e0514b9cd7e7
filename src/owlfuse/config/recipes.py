"""`experiments/<recipe>/recipe.yaml`: a base and stages, each as an experiment's file would have
it. Imports nothing heavy."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from owlfuse.core.errors import ConfigError, hint, label

RECIPE_KEYS = {
    "base": "what all stages have in common, as an experiment's file",
    "stages": "a list of stages, run in order, each started from the weights of the one before",
}
STAGE_KEYS = {
    "name": "of the stage's folder and overrides: letters, digits, `_` and `-`",
    "trains": (
        "a policy for each part that is trained, as `{connector: full, llm: lora}`; the "
        "others are frozen"
    ),
    "all others": "as in an experiment's file, laid over the base",
}
PARTS = ("vision", "connector", "fusion", "llm")


def read_stages(file: Path) -> dict[str, dict[str, Any]]:
    """The stages of a recipe by name, in order, each as the content of an experiment's file: the
    base with the stage over it.

    A stage's `trains` is short for the defaults `override /model/adapter@model.adapter.<part>:
    <policy>`; parts that it does not name are frozen.

    Raises:
        ConfigError: a file that is no recipe, in one line that names the stage.
    """
    import yaml
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(
            f"{label(file)}:{line}: not YAML: {error.problem or error.context}"
        ) from None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("stages"), list)
        or not content["stages"]
    ):
        raise ConfigError(f"{label(file)}: stages: expected a list of stages, each with a name")
    if unknown := set(content) - set(RECIPE_KEYS):
        raise ConfigError(
            f"{label(file)}: {min(unknown)}: no such key of a "
            f"recipe{hint(min(unknown), list(RECIPE_KEYS))}"
        )
    stages: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(content["stages"], 1):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"{label(file)}: stage {number}: expected a name of letters, digits, _ and -, and "
                f"it is {name!r}"
            )
        if name in stages:
            raise ConfigError(
                f"{label(file)}: stage {name}: the name stands twice; a stage's folder is called "
                "by it"
            )
        stages[name] = merged(
            content.get("base") or {}, expanded(stage, f"{label(file)}: stage {name}")
        )
    return stages


def expanded(stage: dict[str, Any], place: str) -> dict[str, Any]:
    """A stage without `name`, and with defaults in the place of `trains`."""
    content = {key: value for key, value in stage.items() if key not in ("name", "trains")}
    trains = stage.get("trains")
    if trains is None:
        return content
    if not isinstance(trains, dict) or not all(
        isinstance(policy, str) for policy in trains.values()
    ):
        raise ConfigError(
            f"{place}: trains: expected a policy for parts, as {{connector: full, llm: lora}}"
        )
    if unknown := set(trains) - set(PARTS):
        raise ConfigError(
            f"{place}: trains.{min(unknown)}: no such part{hint(min(unknown), PARTS)}"
        )
    chosen = [
        {f"override /model/adapter@model.adapter.{part}": trains.get(part, "frozen")}
        for part in PARTS
    ]
    return {**content, "defaults": [*content.get("defaults", []), *chosen]}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, group by group; of two defaults for one group the later counts."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        if key == "defaults":
            entries = [*result.get(key, []), *value]
            named = {
                next(iter(entry)) if isinstance(entry, dict) else entry: entry for entry in entries
            }
            # Hydra wants these last
            result[key] = sorted(named.values(), key=lambda entry: "override " in str(entry))
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result
