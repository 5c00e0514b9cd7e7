"""Composition by Hydra: overrides read and checked, the folders searched, and for every key the
file that set it."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from owlfuse.config.check import locate_target, parameters_of
from owlfuse.config.folders import EXPERIMENTS, ConfigFolders
from owlfuse.config.messages import explain, grammar_error, no_such_option
from owlfuse.config.signatures import read_signature
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint, label, nearest_key

OPTIONAL_GROUPS = ("evaluation", "logger", "callbacks")
"""Groups that a run can do without: <group>=null."""


@dataclass(frozen=True)
class Composition:
    """The folders, the overrides and the experiment of one configuration."""

    folders: ConfigFolders
    overrides: list[Override]
    experiment: str | None = None

    def compose(self) -> DictConfig:
        """Composed, not resolved, with Hydra's own node. Raises ConfigError."""
        for override in self.values:
            group = override.key_or_group.partition(".")[0]
            if group in self.left_out:
                line = override.input_line
                raise ConfigError(
                    f"{COMMAND_LINE}: {line}: {group} is null, so it has no keys; leave out "
                    f"{line} or {group}=null"
                )
        try:
            with _hydra(self.folders):
                config_name = self.folders.root
                return hydra.compose(config_name, overrides=self._lines, return_hydra_config=True)
        except Exception as error:
            # Whatever Hydra, OmegaConf or yaml raise here is about the configuration: nothing of
            # ours runs in between.
            raise self._explained(error) from None

    def origin(self, path: str) -> str:
        """The last file that sets a key, or "command line"; for a key that none sets, that of
        its nearest parent."""
        parts = path.split(".") if path else []
        for n in range(len(parts), 0, -1):
            for place, content in reversed(self._layers):
                if _contains(content, parts[:n]):
                    return place
        return label(self.folders.file(self.folders.root) or self.folders.root)

    @cached_property
    def values(self) -> list[Override]:
        """Overrides of keys, without those that choose an option of a group."""
        return [
            o
            for o in self.overrides
            if o.key_or_group not in self.folders.groups or isinstance(o.value(), dict)
        ]

    @cached_property
    def left_out(self) -> set[str]:
        """Groups that are null."""
        return {o.key_or_group for o in self.overrides if is_left_out(o)}

    @cached_property
    def _lines(self) -> list[str]:
        chosen = [f"{EXPERIMENTS}={_quoted(self.experiment)}"] if self.experiment else []
        # Hydra knows only ~<group> for <group>=null
        lines = [
            f"~{o.key_or_group}" if is_left_out(o) else str(o.input_line) for o in self.overrides
        ]
        return [_search_path(self.folders), *chosen, *lines]

    @cached_property
    def _layers(self) -> list[tuple[str, Any]]:
        """(place, content) in the order in which Hydra merges; later ones win."""
        with _hydra(self.folders):
            loader = GlobalHydra.instance().config_loader()
            entries = loader.compute_defaults_list(
                self.folders.root, self._lines, RunMode.RUN
            ).defaults
        layers = []
        for entry in entries:
            if entry.config_path and (file := self.folders.file(entry.config_path)):
                stage = self.folders.stage(entry.config_path)
                content = (
                    OmegaConf.to_container(OmegaConf.load(file), resolve=False)
                    if stage is None
                    else stage
                )
                layers.append((label(file), _embed(content, entry.package or "")))
        return layers + [(COMMAND_LINE, _embed(o.value(), o.key_or_group)) for o in self.values]

    def _explained(self, error: Exception) -> ConfigError:
        for override in self.values:
            if str(error).startswith(f"Could not override '{override.key_or_group}'.\nTo append"):
                return self._unknown_key(override)
            if str(error).startswith(
                f"Could not append to config. An item is already at '{override.key_or_group}'"
            ):
                line = str(override.input_line)
                return ConfigError(
                    f"{COMMAND_LINE}: {line}: the key exists; write {line.lstrip('+')}"
                )
        file = self.folders.file(f"{EXPERIMENTS}/{self.experiment}") if self.experiment else None
        return explain(error, self.folders, self._blamed(file), [str(file)] if file else [])

    def _blamed(self, file: Path | None) -> str:
        """Where the mistake lies, found by leaving out the command line, and then the
        experiment."""
        if self.overrides and _composes(Composition(self.folders, [], self.experiment)):
            return COMMAND_LINE
        if file and _composes(Composition(self.folders, [])):
            return label(file)
        return label(self.folders.file(self.folders.root) or self.folders.root)

    def _unknown_key(self, override: Override) -> ConfigError:
        """An override of a key that no file sets: an argument that may be added, or a
        misspelling."""
        key = override.key_or_group
        parent, _, name = key.rpartition(".")
        keys: list[str] = list(self.folders.groups)
        # This only looks for a better hint: an error of it would hide the one that is told.
        with suppress(Exception):
            groups = [o for o in self.overrides if o not in self.values]
            config = Composition(self.folders, groups, self.experiment).compose()
            # a dictionary, of a composed one
            del config._content["hydra"]  # type: ignore[union-attr]
            keys += dotted_keys(OmegaConf.to_container(config, resolve=False))
            key = next(
                (k for k in dotted_keys(_embed(override.value(), key)) if k not in keys), key
            )
            parent, _, name = key.rpartition(".")
            target = OmegaConf.select(config, f"{parent}._target_")
            callable_ = (
                (read_signature(target) or locate_target(target, key, self.origin))
                if target
                else None
            )
            arguments = parameters_of(callable_) if callable_ else None
            if name in (arguments or {}):
                line = f"+{override.input_line}"
                return ConfigError(
                    f"{COMMAND_LINE}: {key}: no file sets this argument; to add it, write {line}"
                )
            keys += [f"{parent}.{argument}" for argument in arguments or {}]
        match = nearest_key(key, keys)
        return ConfigError(
            f"{COMMAND_LINE}: {key}: no such key" + (f"; did you mean '{match}'?" if match else "")
        )


def read_overrides(lines: list[str], folders: ConfigFolders, sweep: bool = False) -> list[Override]:
    """Arguments in Hydra's grammar.

    Raises ConfigError for what is wrong with them by themselves.
    """
    overrides = []
    for line in lines:
        if not re.match(r"~.|[^=]+=", line):
            match = nearest_key(line, folders.experiment_names)
            guess = f"; did you mean experiment={match}?" if match else ""
            raise ConfigError(
                f"{COMMAND_LINE}: {line or repr(line)}: not of the form key=value{guess}"
            )
        try:
            override = OverridesParser.create().parse_overrides([line])[0]
        except OverrideParseException as error:
            raise grammar_error(line, str(error)) from None
        # glob(...) asks it for a group's options alone
        override.config_loader = folders  # type: ignore[assignment]
        if override.is_sweep_override():
            if not sweep:
                raise ConfigError(
                    f"{COMMAND_LINE}: {line}: several values; add -m for a run of each, or write "
                    "a list as key=[a,b]"
                )
        else:
            _check_override(override, folders)
        overrides.append(override)
    return overrides


def is_left_out(override: Override) -> bool:
    """Whether it is <group>=null of a group that a run can do without."""
    return (
        override.key_or_group in OPTIONAL_GROUPS
        and not override.is_delete()
        and override.value() is None
    )


def _check_override(override: Override, folders: ConfigFolders) -> None:
    key, value = override.key_or_group, override.value()
    if key.split(".")[0].split("/")[0] in ("hydra", EXPERIMENTS):
        if key == EXPERIMENTS:
            raise ConfigError(f"{COMMAND_LINE}: {key}: no such key; did you mean 'experiment'?")
        raise ConfigError(
            f"{COMMAND_LINE}: {key}: Hydra's own settings cannot be changed; owlfuse runs sweeps "
            "itself"
        )
    if key == "experiment" or override.is_delete() or isinstance(value, dict):
        return
    if key in folders.groups:
        if is_left_out(override):
            return
        for option in value if isinstance(value, list) else [value]:
            if not isinstance(option, str) or folders.file(f"{key}/{option}") is None:
                raise no_such_option(
                    COMMAND_LINE, override.get_key_element(), _plain(option), folders
                )
    elif "/" in key or override.package is not None:
        raise ConfigError(f"{COMMAND_LINE}: {key}: no such group{hint(key, folders.groups)}")
    elif key.replace(".", "/") in folders.groups and isinstance(value, str):
        line = f"{key.replace('.', '/')}={value}"
        raise ConfigError(
            f"{COMMAND_LINE}: {override.input_line}: this replaces a whole group; did you mean "
            f"{line}?"
        )


@contextmanager
def _hydra(folders: ConfigFolders) -> Iterator[None]:
    Plugins.instance().register(ExperimentSource)
    GlobalHydra.instance().clear()
    with warnings.catch_warnings():
        # hydra 1.3 warns where there is none, 1.4 where there is one
        warnings.filterwarnings("ignore", "The version_base")
        initialized = hydra.initialize_config_dir(
            str(folders.configs[0]), job_name="owlfuse", version_base="1.3"
        )
    with initialized:
        yield


def _composes(composition: Composition) -> bool:
    # As in `Composition.compose`, whatever is raised is about the configuration.
    with suppress(Exception), _hydra(composition.folders):
        hydra.compose(composition.folders.root, overrides=composition._lines)
        return True
    return False


def _search_path(folders: ConfigFolders) -> str:
    """The folders after the first as an override: Hydra has no other public way in."""
    paths = [f"file://{folder}" for folder in folders.configs[1:]]
    paths += [f"{ExperimentSource.scheme()}://{folder}" for folder in folders.experiments]
    return f"hydra.searchpath=[{','.join(map(_quoted, paths))}]"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _plain(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    )


def _embed(content: Any, package: str) -> Any:
    for part in reversed(package.split(".") if package else []):
        content = {part: content}
    return content


def _contains(content: Any, parts: list[str]) -> bool:
    for part in parts:
        if isinstance(content, list) and part.isdigit() and int(part) < len(content):
            content = content[int(part)]
        elif isinstance(content, dict) and part in content:
            content = content[part]
        else:
            return False
    return True


def dotted_keys(value: Any, path: str = "") -> list[str]:
    """Every dotted key below a dictionary or list."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    full = {f"{path}{key}": child for key, child in items}
    return [
        *full,
        *(below for key, child in full.items() for below in dotted_keys(child, f"{key}.")),
    ]


class ExperimentSource(FileConfigSource):
    """A folder as Hydra's group `experiments`; its files are for the root (`@package _global_`)
    unless they say otherwise. The stages of `<recipe>/recipe.yaml` are files too,
    `<recipe>/<stage>`."""

    @staticmethod
    def scheme() -> str:
        return "experiments"

    def load_config(self, config_path: str) -> ConfigResult:
        if (stage := self._stage(config_path)) is not None:
            where = f"{self.scheme()}://{self.path}"
            return ConfigResult(
                self.provider, where, OmegaConf.create(stage), header={"package": "_global_"}
            )
        result = super().load_config(self._inside(config_path))
        result.header["package"] = result.header["package"] or "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (
            _is_experiment(config_path) and super().is_group(self._inside(config_path))
        )

    def is_config(self, config_path: str) -> bool:
        if not _is_experiment(config_path):
            return False
        return super().is_config(self._inside(config_path)) or self._stage(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> "list[str]":
        return (
            super().list(self._inside(config_path), results_filter)
            if _is_experiment(config_path)
            else []
        )

    def _stage(self, config_path: str) -> dict[str, Any] | None:
        return ConfigFolders(configs=(), experiments=(Path(self.path),)).stage(config_path)

    @staticmethod
    def _inside(config_path: str) -> str:
        return config_path.partition("/")[2]


def _is_experiment(config_path: str) -> bool:
    return config_path.split("/")[0] == EXPERIMENTS
