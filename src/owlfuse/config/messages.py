"""ConfigError: one line with the place, the key and the nearest right name; Hydra's and
OmegaConf's errors as such."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from owlfuse.config.folders import EXPERIMENTS, ConfigFolders
from owlfuse.config.recipes import read_stages
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint, label, nearest


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Puts the name of a stage or cell before a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{part}: {error}") from error


def check_name(place: str, name: object) -> None:
    """Checks that a name is one of a folder below another: of words with `/` between them, none of
    which leads out of it.

    Args:
        place: where the name is set and its key, as messages begin.

    Raises:
        ConfigError: it leads elsewhere, or no file system takes it.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{place}: {name!r} is no name; give words, as a/b")
    words = name.split("/")
    if any(word in ("", ".", "..") for word in words):
        raise ConfigError(
            f"{place}: {name[:80]!r} leads out of the folder that it is a name in; give words, as "
            "a/b"
        )
    if not name.isprintable():
        raise ConfigError(
            f"{place}: {name[:80]!r} has characters that cannot be shown; give letters, digits, _ "
            "and -"
        )
    if any(len(word.encode()) > 255 for word in words) or len(name.encode()) > 1024:
        raise ConfigError(
            f"{place}: {name[:40]!r}... has {len(name):,} characters, more than a file system takes"
        )


def no_such_option(place: str, group: str, option: str, folders: ConfigFolders) -> ConfigError:
    if group == EXPERIMENTS:
        recipe = option.rpartition("/")[0]
        names = [
            *folders.experiment_names,
            *(f"{recipe}/{stage}" for stage in folders.stage_names(recipe)),
        ]
        if option in folders.recipe_names:
            return ConfigError(
                f"{place}: experiment={option}: this is a recipe; run its stages by owlfuse "
                f"recipe {option}"
            )
        match = nearest(option, names)
        return ConfigError(
            f"{place}: experiment={option}: no such experiment"
            + (f"; did you mean '{match}'?" if match else hint(option, names, listed=24))
        )
    return ConfigError(
        f"{place}: {group}={option}: no such option{hint(option, folders.options(group))}"
    )


def grammar_error(override: str, message: str) -> ConfigError:
    """An argument that Hydra's grammar refuses; `message` is Hydra's, of several lines."""
    if "LexerNoViableAltException" in message:
        column = len(message.splitlines()[1]) - len("LexerNoViableAltException: ")
        what = (
            f"unexpected {override[column - 1 :][:1]!r}"
            if 0 < column <= len(override)
            else "unexpected character"
        )
    elif message.startswith("no viable alternative"):
        what = "a bracket or a quote is not closed"
    else:
        what = message.splitlines()[0].replace("<EOF>", "the end")
    return ConfigError(
        f"{COMMAND_LINE}: {override}: {what}; a value with special characters needs quotes: "
        "key='\"a=b\"'"
    )


def explain(
    error: Exception, folders: ConfigFolders, blamed: str, choosers: list[str]
) -> ConfigError:
    """A library's exception as a ConfigError.

    blamed: the place to name where the exception names no file. choosers: files that may have
    chosen a group's option.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return ConfigError(
            f"{label(mark.name)}:{mark.line + 1}: not YAML: {error.problem or error.context}"
        )
    if isinstance(error.__cause__, OmegaConfBaseException) and not str(error):
        error = error.__cause__
    text = str(error)
    where = re.match(r"In '?([^':]+)'?: ", text)
    file = folders.file(where[1]) if where else None
    place = label(file) if file else COMMAND_LINE if text.startswith("You must specify") else blamed
    text = text[where.end() :] if where else text
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group not in folders.groups and group.split("/")[0] != EXPERIMENTS:
            return ConfigError(f"{place}: {group}: no such group{hint(group, folders.groups)}")
        if group.split("/")[0] == EXPERIMENTS:
            group, option = EXPERIMENTS, error.missing_cfg_file.partition("/")[2]
        return no_such_option(_chooser(group, option, choosers) or place, group, option, folders)
    return ConfigError(f"{place}: {_reword(text, folders)}")


def _reword(text: str, folders: ConfigFolders) -> str:
    """The first telling line of Hydra's message, in the words of our messages."""
    if found := re.match(
        r"Could not override '([^']+)'\.\s*Did you mean to override (.+?)\?", text, re.S
    ):
        return (
            f"{found[1]}: it stands more than once or under another key; did you mean {found[2]}?"
        )
    if found := re.match(r"Could not override '([^']+)'\. No match in the defaults list", text):
        group = found[1].split("@")[0]
        return f"{found[1]}: no such group{hint(group, folders.groups)}"
    if found := re.match(r"You must specify '([^']+)'", text):
        group = found[1].split("@")[0]
        return (
            f"{found[1]}: choose an option, {found[1]}=<option> (there are: "
            f"{', '.join(folders.options(group))})"
        )
    # an exception's name tells a user nothing
    text = re.sub(r"^\w+ raised while \w+ \w+:\s*", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [
        line for line in lines if not line.startswith(("full_key", "object_type", "See http"))
    ]
    said = "; ".join(line.rstrip(".") for line in useful[:2])
    return said.replace(f"{EXPERIMENTS}@_global_: ", "").replace(f"{EXPERIMENTS}=", "experiment=")


def _chooser(group: str, option: str, files: list[str]) -> str | None:
    """The first of the files with `[override] [/]group[@package]: option` in its defaults list."""
    for name in files:
        with open(name, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
        defaults = content.get("defaults") or []
        if "stages" in content:
            defaults = [
                entry
                for stage in read_stages(Path(name)).values()
                for entry in stage.get("defaults", [])
            ]
        for entry in (entry for entry in defaults if isinstance(entry, dict)):
            for key, value in entry.items():
                key = str(key).removeprefix("override ").strip().split("@")[0].lstrip("/")
                if value == option and group.endswith(key):
                    return label(name)
    return None
