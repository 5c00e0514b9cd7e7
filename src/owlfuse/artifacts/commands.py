"""`owlfuse export` and `owlfuse import`.

Heavy imports stay inside, so that mistakes are reported at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owlfuse.artifacts.runs import check_model, check_which
from owlfuse.core.errors import ConfigError
from owlfuse.core.folder_kinds import check_exported, check_released
from owlfuse.core.progress import quiet_libraries
from owlfuse.core.terminal import visible

if TYPE_CHECKING:
    from owlfuse.artifacts.load import TrainedModel

LAYOUTS = ("owlfuse", "released")


def read_options(words: list[str], defaults: dict[str, str]) -> dict[str, str]:
    """Returns `key=value` words over the defaults, `max_shard_size` among them.

    Raises ConfigError with the possible keys.
    """
    options = dict(defaults)
    for word in words:
        key, sep, value = word.partition("=")
        if not sep or key not in defaults:
            keys = ", ".join(f"{name}=" for name in defaults)
            raise ConfigError(f"command line: {word}: not an option; the options are {keys}")
        options[key] = value
    size = options["max_shard_size"]
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", size):
        raise ConfigError(
            f"command line: max_shard_size={size}: expected a number of KB, MB, GB or TB, as 5GB"
        )
    return options


def export_command(source: str, out: str, words: list[str]) -> None:
    """Exports a run, or a folder that was exported or imported, to OUT. Raises ConfigError,
    DataError."""
    defaults = {"merge": "false", "layout": "owlfuse", "max_shard_size": "5GB", "which": "last"}
    options = read_options(words, defaults)
    if options["merge"] not in ("true", "false"):
        raise ConfigError(f"command line: merge={options['merge']}: true or false")
    if options["layout"] not in LAYOUTS:
        raise ConfigError(f"command line: layout={options['layout']}: one of {', '.join(LAYOUTS)}")
    write_export(check_model(source, options["which"]), out, options)


@quiet_libraries()
def write_export(folder: Path, out: str, options: dict[str, str]) -> None:
    """Writes the model of a folder to OUT, as the options of `owlfuse export` say."""
    from owlfuse.artifacts.export import export
    from owlfuse.artifacts.load import ADAPTER
    from owlfuse.artifacts.lora import floating_dtype, merge_lora
    from owlfuse.artifacts.released.saving import save
    from owlfuse.model.quantization import dequantize, quantized_layers

    trained = read_trained(folder, options["which"])
    merge, shards = options["merge"] == "true", options["max_shard_size"]
    if layers := quantized_layers(trained.model):
        layer: Any = next(iter(layers.values()))
        compute_dtype = str(layer.compute_dtype).removeprefix("torch.")
        print_note(
            f"{len(layers)} layers of the LLM are in 4 bits, and {out} has the numbers that these "
            f"stand for, in the precision of {compute_dtype}"
        )
    # the released layout has no place for adapters
    if options["layout"] == "released":
        if merge:
            merge_lora(trained.model)
        # a released folder has no tensors for the scales of weights in 4 bits
        dequantize(trained.model, floating_dtype(trained.model))
        save(trained.model, out, max_shard_size=shards)
        print_note(f"{out} is in the released layout")
        return
    export(trained, Path(out), merge=merge, max_shard_size=shards, source=folder.name)
    if trained.results is None and (folder / "results.json").exists():
        print_note(
            f"{out}/README.md has no results: {folder}/results.json is of other weights; owlfuse "
            f"eval {folder} which={options['which']} makes those of these"
        )
    if (Path(out).expanduser() / ADAPTER).is_dir():
        print_note(
            f"the LoRA adapter is in {out}/{ADAPTER}, and {out}'s weights are those without it; "
            "merge=true folds it in"
        )
    print_next_steps(out)


def print_next_steps(out: str) -> None:
    """Prints what can be done with an exported folder."""
    print_note(
        f"{out}: chat with it by `owlfuse chat {out}`, start a run from it by init_from={out}"
    )


def print_note(note: str) -> None:
    """Prints what a name of the user's is in, which may hold control characters."""
    print(visible(note))


def import_command(source: str, out: str, words: list[str]) -> None:
    """Imports a released mPLUG-Owl to OUT. Raises ConfigError, DataError."""
    options = read_options(words, {"max_shard_size": "5GB"})
    folder = check_released(Path(source))
    with quiet_libraries():
        from owlfuse.artifacts.importing import import_released

        import_released(folder, Path(out), options["max_shard_size"])
        print_next_steps(out)


def read_trained(folder: Path, which: str) -> TrainedModel:
    """The model of a run or of an exported folder."""
    from owlfuse.artifacts.load import TrainedModel, load_exported, load_run

    if (folder / "config.yaml").exists():
        return load_run(folder, which)
    check_which(which, of_run=False)
    wrapped, processor = load_exported(check_exported(folder))
    if processor is None:
        return TrainedModel(wrapped.model, None, None)
    return TrainedModel(wrapped.model, processor.tokenizer, None, processor.image_token)
