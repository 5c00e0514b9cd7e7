"""`owlfuse export` and `owlfuse import`."""

from __future__ import annotations

from pathlib import Path

from owlfuse.config import ConfigError
from owlfuse.hub.export import Trained, check_exported, export, load_exported, load_run

LAYOUTS = ("owlfuse", "released")


def read_options(words: list[str], known: dict[str, str]) -> dict[str, str]:
    """`key=value` words over the defaults. Raises ConfigError with the known keys."""
    options = dict(known)
    for word in words:
        key, sep, value = word.partition("=")
        if not sep or key not in known:
            raise ConfigError(f"command line: {word}: not an option; the options are {', '.join(f'{k}=' for k in known)}")
        options[key] = value
    return options


def export_command(source: str, out: str, words: list[str]) -> None:
    """A run, or a folder that was exported or imported, into OUT."""
    options = read_options(words, {"merge": "false", "layout": "owlfuse", "max_shard_size": "5GB"})
    if options["merge"] not in ("true", "false"):
        raise ConfigError(f"command line: merge={options['merge']}: true or false")
    if options["layout"] not in LAYOUTS:
        raise ConfigError(f"command line: layout={options['layout']}: one of {', '.join(LAYOUTS)}")
    trained = read_trained(Path(source).expanduser())
    merge, shards = options["merge"] == "true", options["max_shard_size"]
    export(trained, Path(out), merge=merge, max_shard_size=shards, source=Path(source).name)
    print(f"{out}: chat with it by `owlfuse chat {out}`, start a run from it by init_from={out}")


def read_trained(folder: Path) -> Trained:
    """The model of a run or of an exported folder."""
    if (folder / "config.yaml").exists():
        return load_run(folder)
    wrapped, processor = load_exported(check_exported(folder))
    return Trained(wrapped.model, processor.tokenizer if processor else None, None)
