"""The stages of a recipe as configurations, composed and compared.

Imports nothing heavy, so that a mistake is told at once.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, open_dict

from owlfuse.config.build import to_dict
from owlfuse.config.compose import PARTS, compose
from owlfuse.config.folders import find_folders
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint

FREE = {
    "pretrained",
    "weights",
    "gguf_file",
    "architecture",
    "dtype",
    "attention",
    "gradient_checkpointing",
    "checkpointing",
}
FREE |= {"chunk", "image_size"}
"""Keys of a part that a stage may have otherwise than the one before: how it computes, and where
weights came from."""


def compose_stages(recipe: str, words: list[str], importing: bool = True) -> dict[str, DictConfig]:
    """The configuration of each stage by its name, in order.

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
        config = compose_stage(recipe, name, words_for(name, names, words), importing)
        first = next(iter(configs.values()), config)
        # all stages lie in one folder, whatever one of them has as its seed
        with open_dict(config):
            config.experiment = recipe
            config.runs = first.runs
            recipe_name = Path(first.name).parent if configs else first.name or f"seed{first.seed}"
            config.name = f"{recipe_name}/{name}"
        if configs:
            config.init_from = None  # given, it is for the first stage
            check_chain(*list(configs.items())[-1], name, config)
        configs[name] = config
    return configs


def words_for(stage: str, names: list[str], words: list[str]) -> list[str]:
    """The overrides of one stage: those of all, then its own without `stages.<stage>.`."""
    common, own = [], []
    for word in words:
        if word.partition("=")[0] in ("experiment", "resume"):
            key = word.partition("=")[0]
            raise ConfigError(
                f"{COMMAND_LINE}: {word}: a recipe has no {key}=; its stages are {', '.join(names)}"
            )
        if not word.startswith("stages."):
            common.append(word)
            continue
        name, _, rest = word.removeprefix("stages.").partition(".")
        if name not in names or not rest:
            raise ConfigError(
                f"{COMMAND_LINE}: {word}: no stage {name}{hint(name, names)}; write "
                "stages.<stage>.<key>=<value>"
            )
        own += [rest] if name == stage else []
    return common + own


def split_dry_run(words: list[str]) -> tuple[bool, list[str]]:
    """The value of the command's own `dry_run=` and the other words. Raises ConfigError."""
    values = [word.partition("=")[2] for word in words if word.startswith("dry_run=")]
    if values and values[-1] not in ("true", "false"):
        raise ConfigError(f"{COMMAND_LINE}: dry_run={values[-1]}: true or false")
    return values[-1:] == ["true"], [word for word in words if not word.startswith("dry_run=")]


def compose_stage(recipe: str, name: str, words: list[str], importing: bool) -> DictConfig:
    """`compose`, with the stage's name in its errors where its file is at fault."""
    try:
        return compose([f"experiment={recipe}/{name}", *words], importing=importing)
    except ConfigError as error:
        of_command_line = str(error).startswith(COMMAND_LINE)
        raise error if of_command_line else ConfigError(f"stage {name}: {error}") from error


def check_chain(earlier: str, before: DictConfig, later: str, config: DictConfig) -> None:
    """The parts must be those of the stage before, whose weights they take. Raises ConfigError."""
    for part in PARTS:
        old, new = to_dict(before.model[part]), to_dict(config.model[part])
        for key in sorted({*old, *new} - FREE):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"stage {later}: model.{part}.{key} is {new.get(key)}, and {old.get(key)} in "
                    f"stage {earlier}, "
                    "whose weights it starts from; set it in the base"
                )
