"""The configuration: its typed root, composition from groups or from a run's folder, and the
checks before building."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from owlfuse.config.aliases import with_current_names
from owlfuse.config.build import to_dict
from owlfuse.config.check import Origin, check_arguments, check_targets
from owlfuse.config.folders import EXPERIMENTS, ConfigFolders, find_folders, known_runs
from owlfuse.config.hydra import OPTIONAL_GROUPS, Composition, dotted_items, read_overrides
from owlfuse.config.messages import check_name, no_such_option
from owlfuse.config.recipes import PARTS
from owlfuse.config.trust import accept, check_weights, read_run_config
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, label, nearest, nearest_key
from owlfuse.core.folder_kinds import describe_path, runs_in

log = logging.getLogger(__name__)


@dataclass
class Adapters:
    """What of each part is trained, and how."""

    vision: dict
    connector: dict
    fusion: dict
    llm: dict


@dataclass
class Model:
    """The parts of the model, each with a `_target_`."""

    vision: dict
    connector: dict
    fusion: dict
    llm: dict
    adapter: dict  # Adapters
    compile: bool = False


@dataclass
class PlanOptions:
    """The key `plan`: for which GPUs and samples `dry_run` plans. Sizes in GB of 10^9 bytes."""

    gpus: int | None = None
    gpu_memory: float = 80.0
    reserve: float = 2.0
    length: int | None = None
    images_per_sample: int = 1
    vocab_size: int | None = None
    peak_tflops: float = 989.0
    share_of_peak: float = 0.4


@dataclass
class Root:
    """The keys of train.yaml."""

    model: dict  # Model
    data: dict
    trainer: dict
    optim: dict
    logger: dict | list | None
    evaluation: dict | None
    experiment: str
    name: str | None
    seed: int
    runs: str
    resume: str | None
    init_from: str | None = None
    dry_run: bool = False
    plan: dict | None = None  # PlanOptions
    checkpoint: dict | None = None
    callbacks: dict | None = None
    accept_changed_data: bool = False


class ComposedConfig(DictConfig):
    """A composed configuration, which knows what set each of its keys; so do its copies."""

    def __init__(self, content: DictConfig, composition: Composition) -> None:
        super().__init__(content)
        # In the way of OmegaConf's own attributes: any other one becomes a key.
        self.__dict__["composition"] = composition

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedConfig:
        # DictConfig makes a plain one, which knows no origins.
        return ComposedConfig(super().__deepcopy__(memo), self.composition)


def compose(
    overrides: list[str], config_dir: str | Path | None = None, importing: bool = True
) -> ComposedConfig:
    """Return the configuration of `overrides`, composed, resolved and checked.

    With `resume=<run>` among the overrides it starts from the run's config.yaml instead of the
    groups.

    Args:
        config_dir: a folder with train.yaml and groups, in place of the package's and the working
            folder's.
        importing: False leaves out the checks for which the modules of the parts are imported;
            `check` does them.

    Raises:
        ConfigError: a mistake, in one line.
    """
    folders = find_folders(config_dir)
    run = _resumed_run(overrides)
    # A folder may have a name that is none in Hydra's grammar.
    lines = [line for line in overrides if not line.startswith("resume=")]
    if run is None:
        composition = _choose_experiment(lines, folders)
        config = _compose(composition)
        config.experiment = composition.experiment or "default"
    else:
        composition = _compose_resumed(lines, run, folders)
        config = _compose(composition, renames=True)
        config.resume = str(run)
        # Runs from before torch's Muon name the type that timm's computed in.
        if isinstance(config.get("optim"), DictConfig):
            with open_dict(config.optim):
                if config.optim.pop("newton_schulz", None):
                    log.warning("%s: optim.newton_schulz is ignored: the device decides", run)
    _resolve(config)
    if isinstance(config.get("name"), int) and not isinstance(config.name, bool):
        config.name = str(config.name)  # name=1 is a name
    check(config, importing)
    if run is None:
        accept(to_dict(config))
        check_new_weights(config)
    return config


def compose_root(root: str, overrides: list[str]) -> ComposedConfig:
    """Return a configuration with another root, `configs/<root>.yaml`: composed and resolved, every
    `_target_` checked as far as that needs no import.

    Raises:
        ConfigError: a mistake, in one line.
    """
    folders = replace(find_folders(), root=root)
    config = _compose(Composition(folders, read_overrides(overrides, folders)))
    _resolve(config)
    check_targets(to_dict(config), partial(origin_of, config), importing=False)
    return config


def check(config: DictConfig, importing: bool = True) -> None:
    """Check keys and types of the fixed levels, then every `_target_`'s arguments.

    Args:
        importing: False checks only what is known of a `_target_` without importing it.

    Raises:
        ConfigError: the first mistake.
    """
    plain = to_dict(config)
    origin = partial(origin_of, config)
    check_levels(plain, origin)
    check_steps(plain["trainer"], origin)
    check_targets(plain, origin, importing)


def check_levels(plain: dict[str, Any], origin: Origin) -> None:
    """Check keys and types of the levels that every configuration has. Raises ConfigError."""
    check_arguments(Root, "", "", plain, origin)
    # Both are names of folders.
    for key in ("experiment", "name"):
        if plain.get(key) is not None:
            # where it was set takes as long to find out as to compose: for a message alone
            try:
                check_name(key, plain[key])
            except ConfigError as error:
                raise ConfigError(f"{origin(key)}: {error}") from None
    # As of a variable of the shell that is not set.
    for key in ("init_from", "runs"):
        if plain.get(key) == "":
            raise ConfigError(f"{origin(key)}: {key}= is empty; leave it out, or name a folder")
    # What numpy and torch take.
    if not 0 <= plain["seed"] < 2**32:
        raise ConfigError(
            f"{origin('seed')}: seed is {plain['seed']}, expected a number from 0 to 4294967295"
        )
    check_arguments(Model, "", "model", plain["model"], origin)
    check_arguments(Adapters, "", "model.adapter", plain["model"]["adapter"], origin)
    check_arguments(PlanOptions, "", "plan", plain.get("plan") or {}, origin)
    for part in PARTS:
        if "_target_" not in plain["model"][part]:
            raise ConfigError(
                f"{origin(f'model.{part}')}: model.{part}._target_: not set, and required"
            )


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's configuration, for reading its model: the names in it checked (see `trust`),
    and the model's arguments.

    Raises:
        ConfigError, DataError: a mistake in config.yaml, in one line.
    """
    plain = read_run_config(folder)

    def origin(path: str) -> str:
        return label(folder / "config.yaml")

    check_levels(plain, origin)
    check_targets({"model": plain["model"]}, origin)
    return plain


def check_new_weights(config: DictConfig) -> None:
    """Raise ConfigError for a new run that names weights as no folder of a model may (see `trust`):
    it would be trained, and then be refused by every command that reads it."""
    for part, group, remedy in (("vision", "kwargs", "weights"), ("llm", "config", "pretrained")):
        try:
            check_weights({part: to_dict(config.model[part])}, "")
        except DataError as error:  # which begins with ": "
            origin = origin_of(config, f"model.{part}.{group}")
            raise ConfigError(f"{origin}{error}; name the file by model.{part}.{remedy}") from error


REPEATED_DATA = ("limit_train_batches", "overfit_batches", "fast_dev_run")
"""Arguments of Lightning's trainer that end its epoch early: a run of owlfuse is one epoch."""


def check_steps(trainer: dict[str, Any], origin: Origin) -> None:
    """Raise ConfigError for numbers that no run can be made of, though Lightning's types allow
    them."""

    def refusal(key: str, expected: str) -> ConfigError:
        value = "null" if trainer[key] is None else trainer[key]
        return ConfigError(
            f"{origin(f'trainer.{key}')}: trainer.{key} is {value}, expected {expected}"
        )

    for key in ("max_steps", "log_every_n_steps"):
        # Not isinstance, for which true is a whole number, too.
        if type(trainer.get(key)) is int and trainer[key] < 1:
            raise refusal(key, "a whole number of optimizer steps from 1 on")
    for key in REPEATED_DATA:
        value = trainer.get(key)
        is_default = not value
        if key == "limit_train_batches":
            # 1.0, Lightning's default, is all batches, 1 is one, and 0 none.
            is_default = value is None or (type(value) is float and value == 1)
        if not is_default:
            raise refusal(
                key,
                "none: it would train the same samples again and again, and mixture.json would "
                "count others; for a short run set trainer.max_steps, for few samples a source of "
                "few",
            )
    for key in ("min_steps", "min_epochs"):
        if trainer.get(key) is not None:
            raise refusal(
                key,
                "none: Lightning would go on to the run's end, whatever asks it to stop, as Ctrl-C "
                "and EarlyStopping do",
            )
    if trainer.get("max_time") is not None:
        raise refusal(
            "max_time",
            "none: it would break off a step, and the run would count as finished; have SIGTERM "
            "sent, by `timeout` or SLURM's --signal, and go on with resume=",
        )
    interval = trainer.get("val_check_interval", 1)
    # Lightning also takes shares of an epoch and times, but the data are an endless stream.
    if type(interval) is not int or interval < 1:
        raise refusal(
            "val_check_interval",
            "a whole number of optimizer steps between two validations, from 1 on",
        )
    limit = trainer.get("gradient_clip_val")
    # Lightning takes a negative one, which turns gradients.
    if isinstance(limit, int | float) and not 0 <= limit < math.inf:
        raise refusal("gradient_clip_val", "a norm of at least 0, or null")


def origin_of(config: DictConfig, path: str) -> str:
    """Return which file (or "command line") set a key, as messages name it: origin_of(config,
    "model.fusion.gate").

    Of a group of keys it is the last file that set any of them. A configuration that was not
    composed here, or a part of one, knows no origins.
    """
    if isinstance(config, ComposedConfig):
        return config.composition.origin(path)
    return "configuration"


def asks_for(config: DictConfig, path: str) -> bool:
    """Whether the experiment or the command line sets a key or chooses the option of its group, see
    `Composition.asks_for`. Of a configuration that was not composed here that is not known."""
    return isinstance(config, ComposedConfig) and config.composition.asks_for(path)


@contextmanager
def naming_part(config: DictConfig) -> Iterator[None]:
    """Raise ConfigError where parts that the block builds do not fit together. Where the message
    begins with a part of the model, the file that configures it stands in front."""
    try:
        yield
    # Both are ValueErrors, and name what is at fault themselves.
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        part = str(error).partition(":")[0]
        message = f"experiment {config.experiment}: {error}"
        if part.partition(".")[0] in config.model:
            message = f"{origin_of(config, f'model.{part}')}: model.{error}"
        raise ConfigError(message) from error


def sweep_cells(overrides: list[str], config_dir: str | Path | None = None) -> list[list[str]]:
    """Return the runs of a sweep, each as its overrides: the product of all comma lists, ranges
    and globs.

    An experiment's `hydra.sweeper.params` are swept over too, where the command line does not set
    the key.
    """
    folders = find_folders(config_dir)
    if _resumed_run(overrides) is not None:
        raise ConfigError(
            f"{COMMAND_LINE}: resume: a sweep cannot be resumed; resume one run at a time, "
            "without -m"
        )
    # All experiments are looked up before the first one is composed.
    compositions = []
    for words in _product(overrides, folders):
        compositions.append((words, _choose_experiment(words, folders)))
    cells = []
    for words, composition in compositions:
        params = OmegaConf.select(composition.compose(), "hydra.sweeper.params") or {}
        set_keys = {override.get_key_element() for override in read_overrides(words, folders)}
        swept = [f"{key}={value}" for key, value in params.items() if key not in set_keys]
        cells += _product(words + swept, folders)
    return cells


def find_run(folder: str | Path) -> Path:
    """Return a run's folder, known by its config.yaml. Raises ConfigError with the nearest run."""
    run = Path(folder).expanduser()
    if (run / "config.yaml").is_file():
        return run
    if kind := describe_path(run):
        raise ConfigError(f"{COMMAND_LINE}: {folder} {kind}")
    # no deeper than its neighbours: above them may be the whole disk
    runs = [*runs_in(run.parent), *known_runs()]
    runs_by_name = {Path(path).name: path for path in runs}
    match = nearest(str(run), runs)
    if match is None:
        match = runs_by_name.get(nearest(run.name, runs_by_name) or "")
    guess = f"; did you mean '{match}'?" if match else ""
    raise ConfigError(
        f"{COMMAND_LINE}: {folder}: not a run: there is no {run / 'config.yaml'}{guess}"
    )


def _choose_experiment(lines: list[str], folders: ConfigFolders) -> Composition:
    """Return the composition of the last `experiment=` and the other overrides; without one it is
    of `default`, where there is such a file."""
    name: Any = "default" if "default" in folders.experiment_names else None
    overrides = []
    for override in read_overrides(lines, folders):
        if override.key_or_group != "experiment":
            overrides.append(override)
            continue
        name = override.value()
        is_group = isinstance(name, dict | list)
        if name is not None and (is_group or not folders.file(f"{EXPERIMENTS}/{name}")):
            raise no_such_option(COMMAND_LINE, EXPERIMENTS, str(name), folders)
    return Composition(folders, overrides, None if name is None else str(name))


def _compose_resumed(lines: list[str], run: Path, folders: ConfigFolders) -> Composition:
    """Return the composition of a run's own configuration with overrides of keys. Raises
    ConfigError for overrides that would make another run of it."""
    try:
        saved = read_run_config(run)
    except DataError as error:
        raise ConfigError(str(error)) from error
    overrides = []
    for override in read_overrides(lines, folders):
        key, value = override.key_or_group, override.value()
        if key == "experiment" and value == saved.get("experiment"):
            continue
        if key in (*folders.groups, "experiment") and not isinstance(value, dict):
            raise ConfigError(
                f"{COMMAND_LINE}: {override.input_line}: a resumed run keeps its experiment and "
                "groups; only keys can change"
            )
        same_folder = {"name": (saved.get("name"), run.name), "runs": (saved.get("runs"),)}
        if key in same_folder and value not in same_folder[key]:
            raise ConfigError(
                f"{COMMAND_LINE}: {override.input_line}: a resumed run stays in its folder, {run}"
            )
        overrides.append(override)
    # As the root of a composition: keys are checked as in any other, and errors name the file.
    run_folders = ConfigFolders(configs=(run.resolve(),), root="config")
    return Composition(run_folders, overrides)


def take_keys(config: DictConfig, other: DictConfig, keys: Iterable[str]) -> None:
    """Set some keys of a composed configuration, or groups of them, to what another one has; those
    that it does not have stay."""
    with open_dict(config):
        for key in keys:
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(other, parent) if parent else other
            if isinstance(node, DictConfig) and name in node:
                OmegaConf.update(config, key, node[name], force_add=True)


def _resumed_run(overrides: list[str]) -> Path | None:
    """Return the folder of the last `resume=`, read outside of Hydra's grammar: a folder may be
    named `lr=1,2`."""
    folder = "null"
    for line in overrides:
        if line.startswith("resume="):
            folder = line.removeprefix("resume=").strip("'\"")
    if not folder:
        raise ConfigError(
            f"{COMMAND_LINE}: resume= is empty; name a run's folder, or write resume=null"
        )
    return None if folder == "null" else find_run(folder)


def _compose(composition: Composition, renames: bool = False) -> ComposedConfig:
    config = composition.compose()
    if renames:  # of an older release, which called some parts otherwise
        names = with_current_names(OmegaConf.to_container(config, resolve=False))
        config = OmegaConf.create(names)
    with open_dict(config):
        del config["hydra"]
        if "model" in config:  # of a run, and not of another root
            for group in OPTIONAL_GROUPS:
                config.setdefault(group, None)  # Hydra leaves out a group that is null
            for group in composition.null_groups:
                config[group] = None  # and keeps what an experiment's file sets in it
    return ComposedConfig(config, composition)


def _resolve(config: DictConfig) -> None:
    """Fill in the interpolations. Raises ConfigError for values that are missing (`???`) and
    interpolations that lead nowhere."""
    values = dotted_items(OmegaConf.to_container(config, resolve=False))
    for key, value in values.items():
        try:
            OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            reason = (error.msg or str(error)).splitlines()[0]
            for reference in re.findall(r"\$\{([\w.]+)\}", str(value)):
                match = nearest_key(reference, values)
                if reference not in values and match:
                    reason += f"; did you mean '{match}'?"
            raise ConfigError(f"{origin_of(config, key)}: {key}: {reason}") from None
    OmegaConf.resolve(config)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(
            f"{origin_of(config, key)}: {key}: needs a value; set it with {key}=<value>"
        )


def _product(lines: list[str], folders: ConfigFolders) -> list[list[str]]:
    """Return every combination of the values that overrides list."""
    choices = []
    for override in read_overrides(lines, folders, sweep=True):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices.append([f"{key}={override.get_value_element_as_str()}"])
        elif override.is_discrete_sweep():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(
                f"{COMMAND_LINE}: {override.input_line}: no list of values; a sweep takes a,b, "
                "range(...), choice(...) or glob(...)"
            )
    return [list(combination) for combination in itertools.product(*choices)]
