"""The configuration: its typed root, composition from groups or from a run's folder, and the
checks before building."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from owlfuse.config.build import to_dict
from owlfuse.config.check import Where, check_arguments, check_targets
from owlfuse.config.folders import EXPERIMENTS, ConfigFolders, find_folders
from owlfuse.config.hydra import OPTIONAL_GROUPS, Composition, dotted_keys, read_overrides
from owlfuse.config.messages import check_name, no_such_option
from owlfuse.config.trust import accept, read_run_config
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, label, nearest, nearest_key
from owlfuse.core.folder_kinds import describe_path

log = logging.getLogger(__name__)

PARTS = ("vision", "connector", "fusion", "llm")


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


def compose(
    overrides: list[str], config_dir: str | Path | None = None, importing: bool = True
) -> DictConfig:
    """The configuration of `overrides`, composed, resolved and checked. Raises ConfigError.

    With `resume=<run>` among the overrides it starts from the run's config.yaml instead of the
    groups. config_dir: a folder with train.yaml and groups, in place of the package's and the
    working folder's. importing: False leaves out the checks for which the modules of the parts are
    imported; `check` does them.
    """
    folders = find_folders(config_dir)
    run = _resumed_run(overrides)
    lines = [line for line in overrides if not line.startswith("resume=")]
    if run is None:
        composition = _choose_experiment(lines, folders)
        config = _without_hydra(composition, experiment=composition.experiment or "default")
    else:
        composition = _on_resume(lines, run, folders)
        config = _without_hydra(composition, resume=str(run))
        # Runs from before torch's Muon name the type that timm's computed in.
        with open_dict(config.optim):
            if config.optim.pop("newton_schulz", None):
                log.warning("%s: optim.newton_schulz is ignored: Muon is in bfloat16", run)
    # beside the content: where each key comes from, for origin_of
    config.__dict__["_composition"] = composition
    _resolve(config)
    if isinstance(config.get("name"), int) and not isinstance(config.name, bool):
        config.name = str(config.name)  # name=1 is a name
    check(config, importing)
    if run is None:
        accept(to_dict(config))
    return config


def compose_root(root: str, overrides: list[str]) -> DictConfig:
    """A configuration with a root of its own, `configs/<root>.yaml`: composed and resolved, every
    `_target_` checked as far as that needs no import. Raises ConfigError."""
    folders = replace(find_folders(), root=root)
    composition = Composition(folders, read_overrides(overrides, folders))
    config = _without_hydra(composition)
    config.__dict__["_composition"] = composition
    _resolve(config)
    check_targets(to_dict(config), lambda path: origin_of(config, path), importing=False)
    return config


def check(config: DictConfig, importing: bool = True) -> None:
    """Keys and types of the fixed levels, then every `_target_`'s arguments. Raises ConfigError.

    importing: False checks only what is known of a `_target_` without importing it.
    """
    plain = to_dict(config)

    def where(path: str) -> str:
        return origin_of(config, path)

    check_levels(plain, where)
    check_steps(plain["trainer"], where)
    check_targets(plain, where, importing)


def check_levels(plain: dict[str, Any], where: Where) -> None:
    """Checks keys and types of the levels that every configuration has. Raises ConfigError."""
    check_arguments(Root, "", "", plain, where)
    for key in ("experiment", "name"):
        if plain.get(key) is not None:
            check_name(f"{where(key)}: {key}", plain[key])
    check_arguments(Model, "", "model", plain["model"], where)
    check_arguments(Adapters, "", "model.adapter", plain["model"]["adapter"], where)
    check_arguments(PlanOptions, "", "plan", plain.get("plan") or {}, where)
    for part in PARTS:
        if "_target_" not in plain["model"][part]:
            raise ConfigError(
                f"{where(f'model.{part}')}: model.{part}._target_: not set, and required"
            )


def read_run(folder: Path) -> dict[str, Any]:
    """A run's configuration, for reading its model: the names in it checked (see `foreign`), and
    the model's arguments.

    Raises:
        ConfigError, DataError: what is wrong with config.yaml, in one line.
    """
    plain = read_run_config(folder)

    def where(path: str) -> str:
        return label(folder / "config.yaml")

    check_levels(plain, where)
    check_targets({"model": plain["model"]}, where)
    return plain


def check_steps(trainer: dict[str, Any], where: Where) -> None:
    """Raises ConfigError for numbers that no run can be made of, though Lightning's types allow
    them."""

    def refuse(key: str, expected: str) -> ConfigError:
        value = "null" if trainer[key] is None else trainer[key]
        return ConfigError(
            f"{where(f'trainer.{key}')}: trainer.{key} is {value}, expected {expected}"
        )

    for key in ("max_steps", "log_every_n_steps"):
        if type(trainer.get(key)) is int and trainer[key] < 1:
            raise refuse(key, "a whole number of optimizer steps from 1 on")
    interval = trainer.get("val_check_interval", 1)
    # of Lightning's other ways to say it a run has no use
    if type(interval) is not int or interval < 1:
        raise refuse(
            "val_check_interval",
            "a whole number of optimizer steps between two validations, from 1 on",
        )
    limit = trainer.get("gradient_clip_val")
    # Lightning takes a negative one, which turns gradients
    if isinstance(limit, int | float) and not 0 <= limit < math.inf:
        raise refuse("gradient_clip_val", "a norm of at least 0, or null")


def origin_of(config: DictConfig, path: str) -> str:
    """Which file (or "command line") set a key, as messages name it: origin_of(config,
    "model.fusion.gate").

    For a group of keys the last place that set any of them. A copy of a composed configuration no
    longer knows.
    """
    composition = config.__dict__.get("_composition")
    return composition.origin(path) if composition else "configuration"


def sweep_cells(overrides: list[str], config_dir: str | Path | None = None) -> list[list[str]]:
    """The runs of a sweep, each as its overrides: the product of all comma lists, ranges and globs.

    An experiment's `hydra.sweeper.params` are swept over too, where the command line does not set
    the key.
    """
    folders = find_folders(config_dir)
    if _resumed_run(overrides) is not None:
        raise ConfigError(
            f"{COMMAND_LINE}: resume: a sweep cannot be resumed; resume one run at a time, "
            "without -m"
        )
    cells = []
    chosen = [(cell, _choose_experiment(cell, folders)) for cell in _product(overrides, folders)]
    for cell, composition in chosen:
        node = composition.compose()
        params = OmegaConf.select(node, "hydra.sweeper.params") or {}
        given = {o.get_key_element() for o in read_overrides(cell, folders)}
        cells += _product(
            cell + [f"{key}={value}" for key, value in params.items() if key not in given], folders
        )
    return cells


def find_run(folder: str | Path) -> Path:
    """A run's folder, known by its config.yaml. Raises ConfigError with the nearest run."""
    run = Path(folder).expanduser()
    if (run / "config.yaml").is_file():
        return run
    if kind := describe_path(run):
        raise ConfigError(f"{COMMAND_LINE}: {folder} {kind}")
    beside = run.parent.glob("*/config.yaml")  # no deeper: above it may be the whole disk
    of_experiments, of_recipes = (
        Path("runs").glob("*/*/config.yaml"),
        Path("runs").glob("*/*/*/config.yaml"),
    )
    runs = {str(file.parent) for files in (beside, of_experiments, of_recipes) for file in files}
    by_name = {Path(r).name: r for r in runs}
    match = nearest(str(run), runs) or by_name.get(nearest(run.name, by_name) or "")
    guess = f"; did you mean '{match}'?" if match else ""
    raise ConfigError(
        f"{COMMAND_LINE}: {folder}: not a run: there is no {run / 'config.yaml'}{guess}"
    )


def _choose_experiment(lines: list[str], folders: ConfigFolders) -> Composition:
    """The last `experiment=` apart from the other overrides; without one, `default` where there
    is such a file."""
    overrides = read_overrides(lines, folders)
    name: Any = "default" if "default" in folders.experiment_names else None
    for override in (o for o in overrides if o.key_or_group == "experiment"):
        name = override.value()
        if name is not None and (
            isinstance(name, dict | list) or not folders.file(f"{EXPERIMENTS}/{name}")
        ):
            raise no_such_option(COMMAND_LINE, EXPERIMENTS, str(name), folders)
    others = [o for o in overrides if o.key_or_group != "experiment"]
    return Composition(folders, others, None if name is None else str(name))


def _on_resume(lines: list[str], run: Path, folders: ConfigFolders) -> Composition:
    """The run's own configuration with overrides of keys; what it was composed of stays."""
    try:
        saved = read_run_config(run)
    except DataError as error:
        raise ConfigError(str(error)) from error
    overrides = read_overrides(lines, folders)
    for override in overrides:
        same_experiment = override.key_or_group == "experiment" and override.value() == saved.get(
            "experiment"
        )
        group = override.key_or_group in (*folders.groups, "experiment") and not isinstance(
            override.value(), dict
        )
        if group and not same_experiment:
            raise ConfigError(
                f"{COMMAND_LINE}: {override.input_line}: a resumed run keeps its experiment and "
                "groups; only keys can change"
            )
        if override.key_or_group in ("name", "runs") and override.value() not in (
            saved.get(override.key_or_group),
            run.name,
        ):
            raise ConfigError(
                f"{COMMAND_LINE}: {override.input_line}: a resumed run stays in its folder, {run}"
            )
    others = [o for o in overrides if o.key_or_group != "experiment"]
    return Composition(ConfigFolders(configs=(run.resolve(),), root="config"), others)


def _resumed_run(overrides: list[str]) -> Path | None:
    """The folder of the last `resume=`, read outside of Hydra's grammar: a folder may be named
    `lr=1,2`."""
    values = [
        line.partition("=")[2].strip("'\"") for line in overrides if line.startswith("resume=")
    ]
    return find_run(values[-1]) if values and values[-1] not in ("", "null") else None


def _without_hydra(composition: Composition, **root_keys: str) -> DictConfig:
    config = composition.compose()
    with open_dict(config):
        del config["hydra"]
        if "model" in config:  # of a run, and not of another root
            for group in OPTIONAL_GROUPS:
                config.setdefault(group, None)  # Hydra leaves out a group that is null
            for group in composition.left_out:
                config[group] = None  # and keeps what an experiment's file sets in it
        config.update(root_keys)
    return config


def _resolve(config: DictConfig) -> None:
    """Fill in the interpolations.

    Values that are missing (`???`) and interpolations that lead nowhere are errors.
    """
    keys = dotted_keys(OmegaConf.to_container(config, resolve=False))
    for key in keys:
        try:
            OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            what = (
                (error.msg or str(error))
                .splitlines()[0]
                .split("while resolving interpolation: ")[-1]
            )
            wanted = what.split("'")[1] if what.startswith("Interpolation key '") else ""
            match = nearest_key(wanted, keys) if wanted else None
            guess = f"; did you mean '{match}'?" if match else ""
            raise ConfigError(f"{origin_of(config, key)}: {key}: {what}{guess}") from None
    OmegaConf.resolve(config)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(
            f"{origin_of(config, key)}: {key}: needs a value; set it with {key}=<value>"
        )


def _product(lines: list[str], folders: ConfigFolders) -> list[list[str]]:
    return BasicSweeper.split_arguments(read_overrides(lines, folders, sweep=True), None)[0]


def place(config: DictConfig, message: str) -> str:
    """A message that begins with a part of the model, with the file that configures the part
    before it."""
    part = message.partition(":")[0]
    if part.partition(".")[0] not in config.model:
        return f"experiment {config.experiment}: {message}"
    return f"{origin_of(config, f'model.{part}')}: model.{message}"
