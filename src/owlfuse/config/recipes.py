"""`experiments/<recipe>/recipe.yaml`: a base and stages, each with the content of an experiment's
file. Imports nothing heavy."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from owlfuse.core.errors import ConfigError, hint, label, yaml_error

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


def read_yaml(file: Path) -> Any:
    """Return the content of a yaml, unresolved: `${...}` is the experiment's, and 1e-3 a number.

    Raises:
        ConfigError: a file that is no YAML, with the line where it is known.
    """
    # Here: every command imports this module, also for its --help alone.
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except yaml.MarkedYAMLError as error:
        raise yaml_error(error) from None
    # An interpolation that is not closed.
    except OmegaConfBaseException as error:
        raise ConfigError(f"{label(file)}: {error}") from None
    # Another encoding than UTF-8, or a control character.
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{label(file)}: not YAML in UTF-8: {error}") from None


def read_stages(file: Path) -> dict[str, dict[str, Any]]:
    """Return the stages of a recipe by name, in order, each as the content of an experiment's file:
    the base with the stage merged over it.

    A stage's `trains` is short for the defaults `override /model/adapter@model.adapter.<part>:
    <policy>`; parts that it does not name are frozen.

    Raises:
        ConfigError: a file that is no recipe, in one line that names the stage.
    """
    content = read_yaml(file)
    entries = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{label(file)}: stages: expected a list of stages, each with a name")
    if unknown := set(content) - set(RECIPE_KEYS):
        key = min(unknown)
        raise ConfigError(
            f"{label(file)}: {key}: no such key of a recipe{hint(key, list(RECIPE_KEYS))}"
        )
    base = content.get("base") or {}
    check_settings(base, f"{label(file)}: base")
    stages: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(entries, 1):
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
        check_settings(stage, f"{label(file)}: stage {name}")
        # `trains` freezes what it does not name, so that a stage cannot train a part by oversight.
        settings = stage_settings(stage, f"{label(file)}: stage {name}")
        stages[name] = merged(base, settings)
    return stages


def check_settings(settings: Any, label: str) -> None:
    """Raises ConfigError for what is no content of an experiment's file.

    Args:
        label: the file and the part of it, as messages begin.
    """
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{label}: expected keys as in an experiment's file, and it is {settings!r}"
        )
    defaults = settings.get("defaults")
    if not isinstance(defaults, list | None):
        raise ConfigError(f"{label}: defaults: expected a list, and it is {defaults!r}")


def stage_settings(stage: dict[str, Any], label: str) -> dict[str, Any]:
    """Return a stage without `name`, and with defaults instead of `trains`.

    Args:
        label: the file and the stage, as messages begin.
    """
    settings = dict(stage)
    del settings["name"]
    policies = settings.pop("trains", None)
    if policies is None:
        return settings
    is_table = isinstance(policies, dict)
    if not is_table or not all(isinstance(policy, str) for policy in policies.values()):
        raise ConfigError(
            f"{label}: trains: expected a policy for parts, as {{connector: full, llm: lora}}"
        )
    if unknown := set(policies) - set(PARTS):
        part = min(unknown)
        raise ConfigError(f"{label}: trains.{part}: no such part{hint(part, PARTS)}")
    defaults = list(settings.get("defaults") or [])
    for part in PARTS:
        group = f"override /model/adapter@model.adapter.{part}"
        defaults.append({group: policies.get(part, "frozen")})
    return {**settings, "defaults": defaults}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `over` merged over `base`, group by group; of two defaults for one group the later
    counts."""
    # The base is shared by all stages, and Hydra's store keeps what it is given.
    result = copy.deepcopy(base)
    for key, value in over.items():
        if key == "defaults":
            entry_by_group = {}
            for entry in [*(result.get(key) or []), *(value or [])]:
                group = next(iter(entry)) if isinstance(entry, dict) else entry
                entry_by_group[group] = entry
            # Hydra requires overrides to be last.
            result[key] = sorted(entry_by_group.values(), key=lambda e: "override " in str(e))
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result
