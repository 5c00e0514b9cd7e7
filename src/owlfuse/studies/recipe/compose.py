"""The stages of a recipe as configurations, composed and compared.

Imports nothing heavy, so that a mistake is shown at once.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, open_dict

from owlfuse.config.compose import compose
from owlfuse.config.folders import find_folders
from owlfuse.config.messages import split_settings
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint


def compose_stages(recipe: str, words: list[str], importing: bool = True) -> dict[str, DictConfig]:
    """Return the configuration of each stage by its name, in order.

    Args:
        words: overrides for every stage, and `stages.<stage>.<override>` for one.
        importing: see `compose`.

    Raises:
        ConfigError: no such recipe, a mistake in a stage, or stages whose parts differ.
    """
    folders = find_folders()
    names = folders.stage_names(recipe)
    if not names:
        raise ConfigError(
            f"{COMMAND_LINE}: recipe {recipe}: no such recipe{hint(recipe, folders.recipe_names)}"
        )
    configs: dict[str, DictConfig] = {}
    for name in names:
        overrides = [f"experiment={recipe}/{name}", *words_for(name, names, words)]
        try:
            config = compose(overrides, importing=importing)
        except ConfigError as error:
            # A word for all stages is at fault in each of them.
            if str(error).startswith(COMMAND_LINE):
                raise
            raise ConfigError(f"stage {name}: {error}") from error
        # All stages lie in the first one's folder, whatever one of them has as its seed.
        first = next(iter(configs.values()), config)
        recipe_name = Path(first.name).parent if configs else first.name or f"seed{first.seed}"
        with open_dict(config):
            config.experiment = recipe
            config.runs = first.runs
            config.name = f"{recipe_name}/{name}"
        if config.init_from not in (None, first.init_from):
            raise ConfigError(
                f"stage {name}: init_from is {config.init_from}, and it starts from the weights of "
                "the stage before; leave it out"
            )
        if configs:
            config.init_from = None  # given for all, it is for the first stage
        configs[name] = config
    return configs


OF_THE_RECIPE = ("experiment", "resume", "name", "runs", "dry_run")
"""Keys that are the whole recipe's, or that a recipe has not."""


def words_for(stage: str, names: list[str], words: list[str]) -> list[str]:
    """Return the overrides of one stage: those of all, then its own without `stages.<stage>.`."""
    common_words = []
    stage_words = []
    for word in words:
        key = word.partition("=")[0]
        if key in ("experiment", "resume"):
            raise ConfigError(
                f"{COMMAND_LINE}: {word}: a recipe has no {key}=; its stages are {', '.join(names)}"
            )
        if not word.startswith("stages."):
            common_words.append(word)
            continue
        name, _, override = word.removeprefix("stages.").partition(".")
        if name not in names or not override:
            raise ConfigError(
                f"{COMMAND_LINE}: {word}: no stage {name}{hint(name, names)}; write "
                "stages.<stage>.<key>=<value>"
            )
        key = override.partition("=")[0].lstrip("+~")
        if key in OF_THE_RECIPE:
            raise ConfigError(
                f"{COMMAND_LINE}: {word}: a stage has no {key} of its own; leave out stages.{name}."
            )
        if name == stage:
            stage_words.append(override)
    return common_words + stage_words  # the last override of a key counts


def split_dry_run(words: list[str]) -> tuple[bool, list[str]]:
    """Return the value of the command's own `dry_run=` and the other words. Raises ConfigError."""
    settings, overrides = split_settings(words, ["dry_run"])
    value = settings.get("dry_run", "false")
    if value not in ("true", "false"):
        raise ConfigError(f"{COMMAND_LINE}: dry_run={value}: true or false")
    return value == "true", overrides
