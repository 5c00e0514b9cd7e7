"""The words of a command line, and errors of a configuration, that several commands have."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from owlfuse.config.folders import EXPERIMENTS, ConfigFolders
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, hint, nearest


def split_settings(words: list[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return the values of a command's own `<name>=<value>` words by name, and the other words."""
    settings = {}
    others = []
    for word in words:
        name, sign, value = word.partition("=")
        # A word without a sign is left to the checks of overrides, which refuse it.
        if sign and name in names:
            settings[name] = value
        else:
            others.append(word)
    return settings, others


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Put the name of a stage or cell before a ConfigError or DataError of the block."""
    try:
        yield
    except (ConfigError, DataError) as error:
        # A cell is composed of words that may come from a file, and not from the command line.
        message = str(error).removeprefix(f"{COMMAND_LINE}: ")
        raise type(error)(f"{part}: {message}") from error


def check_name(key: str, name: object) -> None:
    """Check that a name is one of a folder below another: words with `/` between them, none of
    which leads out of it.

    Args:
        key: the file and key that set the name, as messages begin.

    Raises:
        ConfigError: it leads elsewhere, or no file system takes it.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{key}: {name!r} is no name; give words, as a/b")
    words = name.split("/")
    if any(word in ("", ".", "..") for word in words):
        raise ConfigError(
            f"{key}: {name[:80]!r} leads out of the folder that it is a name in; give words, as a/b"
        )
    if not name.isprintable():
        raise ConfigError(
            f"{key}: {name[:80]!r} has characters that cannot be shown; give letters, digits, _ "
            "and -"
        )
    # the limits of ext4, XFS and APFS for a component, and a quarter of Linux' for a path
    if any(len(word.encode()) > 255 for word in words) or len(name.encode()) > 1024:
        raise ConfigError(
            f"{key}: {name[:40]!r}... has {len(name):,} characters, more than a file system takes"
        )


def no_such_option(
    source: str,
    group: str,
    option: str,
    folders: ConfigFolders,
) -> ConfigError:
    """Return the error of a group that has no such option, or of an experiment that is not there.

    Args:
        source: the file that chooses it, or "command line".
    """
    if group != EXPERIMENTS:
        options = folders.options(group)
        return ConfigError(f"{source}: {group}={option}: no such option{hint(option, options)}")
    if option in folders.recipe_names:
        return ConfigError(
            f"{source}: experiment={option}: this is a recipe; run its stages by owlfuse recipe "
            f"{option}"
        )
    recipe = option.rpartition("/")[0]
    names = list(folders.experiment_names)
    names += [f"{recipe}/{stage}" for stage in folders.stage_names(recipe)]
    match = nearest(option, names)
    guess = f"; did you mean '{match}'?" if match else hint(option, names, listed=24)
    return ConfigError(f"{source}: experiment={option}: no such experiment{guess}")
