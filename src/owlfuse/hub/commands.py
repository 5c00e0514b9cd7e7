"""`owlfuse export` and `owlfuse import`."""

from __future__ import annotations

from pathlib import Path

from owlfuse.config import ConfigError
from owlfuse.hub.adapter import merge_lora
from owlfuse.hub.export import ADAPTER, Trained, check_exported, export, load_exported, load_run
from owlfuse.hub.importing import import_released
from owlfuse.quiet import quiet_libraries
from owlfuse.released import save
from owlfuse.runs import check_which
from owlfuse.terminal import visible

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


@quiet_libraries()
def export_command(source: str, out: str, words: list[str]) -> None:
    """A run, or a folder that was exported or imported, into OUT."""
    options = read_options(words, {"merge": "false", "layout": "owlfuse", "max_shard_size": "5GB", "which": "last"})
    if options["merge"] not in ("true", "false"):
        raise ConfigError(f"command line: merge={options['merge']}: true or false")
    if options["layout"] not in LAYOUTS:
        raise ConfigError(f"command line: layout={options['layout']}: one of {', '.join(LAYOUTS)}")
    trained = read_trained(Path(source).expanduser(), options["which"])
    merge, shards = options["merge"] == "true", options["max_shard_size"]
    if options["layout"] == "released":
        if merge:
            merge_lora(trained.model)
        save(trained.model, out, max_shard_size=shards)
        print(visible(f"{out} is in the released layout"))
        return
    export(trained, Path(out), merge=merge, max_shard_size=shards, source=Path(source).name)
    if (Path(out).expanduser() / ADAPTER).is_dir():
        print(
            visible(f"the LoRA adapter is in {out}/{ADAPTER}, and {out}'s weights are those without it; merge=true folds it in")
        )
    print(visible(f"{out}: chat with it by `owlfuse chat {out}`, start a run from it by init_from={out}"))


@quiet_libraries()
def import_command(source: str, out: str, words: list[str]) -> None:
    """A released mPLUG-Owl into OUT."""
    options = read_options(words, {"max_shard_size": "5GB"})
    differences = import_released(Path(source).expanduser(), Path(out), options["max_shard_size"])
    for name, value in differences.items():
        print(visible(f"largest difference from io.safetensors, {name}: {value:.2e}"))
    print(visible(f"{out}: chat with it by `owlfuse chat {out}`, start a run from it by init_from={out}"))


def read_trained(folder: Path, which: str = "last") -> Trained:
    """The model of a run or of an exported folder."""
    if (folder / "config.yaml").exists():
        return load_run(folder, which)
    check_which(which, of_run=False)
    wrapped, processor = load_exported(check_exported(folder))
    if processor is None:
        return Trained(wrapped.model, None, None)
    return Trained(wrapped.model, processor.tokenizer, None, processor.image_token)
