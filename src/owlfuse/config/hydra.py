"""Composition by Hydra: overrides are read and checked, and each key's origin is known."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.config.check import is_within, locate_target, parameters_of, walk
from owlfuse.config.folders import EXPERIMENTS, ConfigFolders
from owlfuse.config.messages import no_such_option
from owlfuse.config.signatures import read_signature
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint, label, nearest_key, yaml_error

# Groups that a run can do without: <group>=null.
OPTIONAL_GROUPS = ("evaluation", "logger", "callbacks")


@dataclass(frozen=True)
class Composition:
    """The folders, the overrides and the experiment of one configuration."""

    folders: ConfigFolders
    overrides: list[Override]
    experiment: str | None = None

    def compose(self) -> DictConfig:
        """Return the configuration, composed and not resolved, with Hydra's own node.

        Raises:
            ConfigError: what Hydra, OmegaConf or yaml object to, in one line.
        """
        # Hydra's own error would be about the key, and not about the group that is null.
        self._check_null_groups()
        try:
            with self._initialized():
                config = hydra.compose(
                    self.folders.root, overrides=self._lines, return_hydra_config=True
                )
            # Hydra takes the first file of a name, and looking them up refuses to hide another.
            if len(self.folders.configs) > 1:
                _ = self._layers
            return config
        # Of a recipe's file, or of two files with one name: it says where already.
        except ConfigError:
            raise
        # What Hydra, OmegaConf and yaml raise has no common base, and is always about the
        # configuration: no other code runs in between.
        except Exception as error:
            raise self._config_error(error) from None

    def origin(self, path: str) -> str:
        """Return the last file that sets a key, or "command line"; for a key that none sets, that
        of its nearest parent."""
        parts = path.split(".") if path else []
        for length in range(len(parts), 0, -1):
            # The last layer wins, as in Hydra's merge.
            for source, content, _ in reversed(self._layers):
                if has_key(content, parts[:length]):
                    return source
        return self._root_label

    def asks_for(self, path: str) -> bool:
        """Whether the experiment or the command line sets a key or one below it, or chooses the
        option of its group; else its value is that of train.yaml's defaults."""
        groups = {override.get_key_element() for override in self.group_overrides}
        for _, content, is_asked in self._layers:
            if not is_asked:
                continue
            if has_key(content, path.split(".")):
                return True
            groups |= _overridden_groups(content)
        keys = {group.rpartition("@")[2].strip("/").replace("/", ".") for group in groups}
        return is_within(path, *keys)

    @cached_property
    def group_overrides(self) -> list[Override]:
        """Overrides that choose an option of a group."""
        overrides = []
        for override in self.effective_overrides:
            if override.key_or_group in self.folders.groups and not is_mapping(override):
                overrides.append(override)
        return overrides

    @cached_property
    def effective_overrides(self) -> list[Override]:
        """The overrides without those choices of an optional group that a later one replaces: Hydra
        would apply a null after all others."""
        last: dict[str, Override] = {}
        for override in self.overrides:
            if override.key_or_group in OPTIONAL_GROUPS and not is_mapping(override):
                last[override.key_or_group] = override
        kept = []
        for override in self.overrides:
            chosen = last.get(override.key_or_group)
            if chosen is None or chosen is override or is_mapping(override):
                kept.append(override)
        return kept

    @cached_property
    def key_overrides(self) -> list[Override]:
        """Overrides of keys, a whole group of them among these."""
        of_groups = self.group_overrides
        return [override for override in self.effective_overrides if override not in of_groups]

    @cached_property
    def null_groups(self) -> set[str]:
        """Groups that the overrides set to null."""
        return {o.key_or_group for o in self.effective_overrides if is_null_group(o)}

    @property
    def _root_label(self) -> str:
        return label(self.folders.file(self.folders.root) or self.folders.root)

    @cached_property
    def _lines(self) -> list[str]:
        """The overrides as Hydra is given them."""
        lines = [_search_path(self.folders)]
        if self.experiment:
            # An experiment's file is for the root, whichever group it lies in.
            lines.append(f"{EXPERIMENTS}@_global_={_quoted(self.experiment)}")
        for override in self.effective_overrides:
            # Hydra knows only ~<group> for <group>=null.
            is_null = is_null_group(override)
            lines.append(f"~{override.key_or_group}" if is_null else str(override.input_line))
        return lines

    @cached_property
    def _layers(self) -> list[tuple[str, Any, bool]]:
        """(file or "command line", content, whether it is an experiment's or the command line's) in
        the order in which Hydra merges; later ones win."""
        with self._initialized():
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(self.folders.root, self._lines, RunMode.RUN)
        layers = []
        for entry in defaults.defaults:
            path = entry.config_path or ""
            file = self.folders.file(path) if path else None
            if file is None:
                continue
            content = nested(self.folders.content(path, file), entry.package or "")
            layers.append((label(file), content, path.startswith(f"{EXPERIMENTS}/")))
        for override in self.key_overrides:
            content = nested(override.value(), override.key_or_group)
            layers.append((COMMAND_LINE, content, True))
        return layers

    @contextmanager
    def _initialized(self) -> Iterator[None]:
        """Hydra's global state for the folders, the experiment among its configurations."""
        self._store_experiments()
        # Hydra allows one initialization a process, and a recipe composes several stages.
        GlobalHydra.instance().clear()
        with warnings.catch_warnings():
            # hydra 1.3 warns where there is none, 1.4 where there is one
            warnings.filterwarnings("ignore", "The version_base")
            initialized = hydra.initialize_config_dir(
                str(self.folders.configs[0]), job_name="owlfuse", version_base="1.3"
            )
        with initialized:
            yield

    def _store_experiments(self) -> None:
        """Give Hydra the experiment or the recipe's stage, and the experiments of its defaults
        list.

        By the ConfigStore: with the folder of `experiments/` in the search path, each folder beside
        it would be a group, and `runs=DIR` an option of the group `runs`.
        """
        store = ConfigStore.instance()
        store.repo.pop(EXPERIMENTS, None)  # those of another folder
        paths = [f"{EXPERIMENTS}/{self.experiment}"] if self.experiment else []
        stored: set[str] = set()
        while paths:
            path = paths.pop()
            file = self.folders.file(path)
            if path in stored or file is None:  # of a file that is missing, Hydra says so
                continue
            content = self.folders.content(path, file)
            _check_defaults(content, file)
            group, _, option = path.rpartition("/")
            store.store(option, content, group, package="_global_")
            stored.add(path)
            paths += _listed_experiments(content, group)

    def _check_null_groups(self) -> None:
        for override in self.key_overrides:
            group = override.key_or_group.partition(".")[0]
            if group in self.null_groups:
                line = override.input_line
                raise ConfigError(
                    f"{COMMAND_LINE}: {line}: {group} is null, so it has no keys; leave out "
                    f"{line} or {group}=null"
                )

    def _config_error(self, error: Exception) -> ConfigError:
        """Return an error of Hydra as it is, with the file in front that is at fault."""
        if isinstance(error, yaml.MarkedYAMLError):
            return yaml_error(error)
        key_error = self._find_key_error()
        if key_error is not None:
            return key_error
        source = self._faulty_source()
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, option = error.missing_cfg_file.rpartition("/")
            if group.split("/")[0] == EXPERIMENTS:  # one group for us, with names such as a/b
                group, _, option = error.missing_cfg_file.partition("/")
            if group in (EXPERIMENTS, *self.folders.groups):
                return no_such_option(source, group, option, self.folders)
        # Hydra raises some errors of OmegaConf again without their message.
        return ConfigError(f"{source}: {str(error) or error.__cause__}")

    def _faulty_source(self) -> str:
        """Return the source that does not compose: the command line if all is well without it,
        the experiment if the groups alone compose, or the root file."""
        if self.overrides and Composition(self.folders, [], self.experiment).composes():
            return COMMAND_LINE
        file = self.folders.file(f"{EXPERIMENTS}/{self.experiment}") if self.experiment else None
        if file and Composition(self.folders, []).composes():
            return label(file)
        return self._root_label

    def composes(self) -> bool:
        """Whether Hydra composes it."""
        try:
            self.compose()
        except ConfigError:
            return False
        return True

    def _find_key_error(self) -> ConfigError | None:
        """Return the error of the first override of a key that is not there, or that is added and
        is there; None where the keys are right or the files themselves do not compose."""
        if not self.key_overrides:
            return None
        try:
            config = Composition(self.folders, self.group_overrides, self.experiment).compose()
        except ConfigError:
            return None
        with open_dict(config):
            del config["hydra"]
        # Unresolved, since the interpolations may need the very overrides that are left out here.
        keys = set(dotted_items(OmegaConf.to_container(config, resolve=False)))
        for override in self.key_overrides:
            key, line = override.key_or_group, str(override.input_line)
            if override.is_delete():
                continue
            if override.is_add() and key in keys:
                return ConfigError(
                    f"{COMMAND_LINE}: {line}: the key exists; write {line.lstrip('+')}"
                )
            set_keys = dotted_items(nested(override.value(), key))
            if not override.is_add() and not override.is_force_add():
                unknown = [set_key for set_key in set_keys if set_key not in keys]
                if unknown:
                    return self._unknown_key_error(unknown[0], line, config, keys)
            # A later override may change a key that an earlier one has added.
            keys.update(set_keys)
        return None

    def _unknown_key_error(
        self,
        key: str,
        line: str,
        config: DictConfig,
        keys: set[str],
    ) -> ConfigError:
        """Return the error of a key that no file sets: an argument that may be added, or a
        misspelling."""
        parent, _, name = key.rpartition(".")
        arguments = self._target_arguments(config, parent)
        if name in arguments:
            return ConfigError(
                f"{COMMAND_LINE}: {key}: no file sets this argument; to add it, write +{line}"
            )
        names = [*self.folders.groups, *sorted(keys)]
        names += [f"{parent}.{argument}" for argument in arguments]
        match = nearest_key(key, names)
        guess = f"; did you mean '{match}'?" if match else ""
        return ConfigError(f"{COMMAND_LINE}: {key}: no such key{guess}")

    def _target_arguments(self, config: DictConfig, path: str) -> list[str]:
        """Return what the `_target_` at a path takes; nothing where there is none or it is
        wrong."""
        target = OmegaConf.select(config, f"{path}._target_")
        if target is None:
            return []
        try:
            function = read_signature(target) or locate_target(target, path, self.origin)
        except ConfigError:
            return []
        return list(parameters_of(function) or {})


def read_overrides(lines: list[str], folders: ConfigFolders, sweep: bool = False) -> list[Override]:
    """Parse arguments by Hydra's grammar.

    Raises:
        ConfigError: an argument that is wrong whatever the others are.
    """
    overrides = []
    for line in lines:
        # Before Hydra's grammar, whose message about a lone word is of tokens.
        if not re.match(r"~.|[^=]+=", line):
            match = nearest_key(line, folders.experiment_names)
            guess = f"; did you mean experiment={match}?" if match else ""
            raise ConfigError(
                f"{COMMAND_LINE}: {line or repr(line)}: not of the form key=value{guess}"
            )
        try:
            override = OverridesParser.create().parse_overrides([line])[0]
        except OverrideParseException as error:
            raise ConfigError(
                f"{COMMAND_LINE}: {line}: {error}; a value with special characters needs quotes: "
                "key='\"a=b\"'"
            ) from None
        # glob(...) asks it for a group's options alone
        override.config_loader = folders  # type: ignore[assignment]
        if not override.is_sweep_override():
            _check_override(override, folders)
        elif not sweep:
            is_group = override.key_or_group in folders.groups
            instead = "choose one" if is_group else "write a list as key=[a,b]"
            raise ConfigError(
                f"{COMMAND_LINE}: {line}: several values; {instead}, or add -m to owlfuse train "
                "for a run of each"
            )
        overrides.append(override)
    return overrides


def is_mapping(override: Override) -> bool:
    """Whether it gives keys, and not an option of a group."""
    return not override.is_delete() and isinstance(override.value(), dict)


def is_null_group(override: Override) -> bool:
    """Whether it is <group>=null of a group that a run can do without."""
    if override.key_or_group not in OPTIONAL_GROUPS or override.is_delete():
        return False
    return override.value() is None


def _check_override(override: Override, folders: ConfigFolders) -> None:
    key, value = override.key_or_group, override.value()
    if key == EXPERIMENTS:
        raise ConfigError(f"{COMMAND_LINE}: {key}: no such key; did you mean 'experiment'?")
    if re.split(r"[./]", key)[0] in ("hydra", EXPERIMENTS):
        raise ConfigError(
            f"{COMMAND_LINE}: {key}: Hydra's own settings cannot be changed; owlfuse runs sweeps "
            "itself"
        )
    if key == "experiment" or override.is_delete() or isinstance(value, dict):
        return
    if key in folders.groups:
        _check_options(override, folders)
    elif "/" in key or override.package is not None:
        raise ConfigError(f"{COMMAND_LINE}: {key}: no such group{hint(key, folders.groups)}")
    elif key.replace(".", "/") in folders.groups and isinstance(value, str):
        raise ConfigError(
            f"{COMMAND_LINE}: {override.input_line}: this replaces a whole group; did you mean "
            f"{key.replace('.', '/')}={value}?"
        )


def _check_options(override: Override, folders: ConfigFolders) -> None:
    """Raise ConfigError where an override chooses an option that its group does not have."""
    if is_null_group(override):
        return
    value = override.value()
    options = value if isinstance(value, list) else [value]
    if len(options) > 1 and is_one_part(override.key_or_group, options, folders):
        raise ConfigError(
            f"{COMMAND_LINE}: {override.input_line}: {override.key_or_group} is one part, of which "
            "Hydra would mix the options; choose one"
        )
    for option in options:
        if isinstance(option, str) and folders.file(f"{override.key_or_group}/{option}"):
            continue
        if not isinstance(option, str):
            option = yaml.safe_dump(option, default_flow_style=True).split("\n")[0]
        raise no_such_option(COMMAND_LINE, override.get_key_element(), option, folders)


def is_one_part(group: str, options: list[Any], folders: ConfigFolders) -> bool:
    """Whether an option of a group is a part with a `_target_`, of which there can be one, and not
    a key of its own beside others, as a logger."""
    for option in options:
        path = f"{group}/{option}"
        file = folders.file(path)
        content = folders.content(path, file) if file else None
        if isinstance(content, dict) and "_target_" in content:
            return True
    return False


def _check_defaults(content: Any, file: Path) -> None:
    """Raise ConfigError where a defaults list overrides one group twice, of which Hydra takes the
    first."""
    defaults = content.get("defaults") if isinstance(content, dict) else None
    groups: list[str] = []
    for entry in defaults if isinstance(defaults, list) else []:
        for key in entry if isinstance(entry, dict) else []:
            if str(key).startswith("override "):
                groups.append(str(key).removeprefix("override ").strip().lstrip("/"))
    for group in groups:
        if groups.count(group) > 1:
            raise ConfigError(f"{label(file)}: defaults: {group} is overridden twice; keep one")


def _listed_experiments(content: Any, group: str) -> list[str]:
    """Return the paths of the experiments that a defaults list names, in its group or with a
    slash; an entry `group: option` is no experiment."""
    defaults = content.get("defaults") if isinstance(content, dict) else None
    paths = []
    for entry in defaults if isinstance(defaults, list) else []:
        name = entry.partition("@")[0] if isinstance(entry, str) else ""
        path = name[1:] if name.startswith("/") else f"{group}/{name}"
        if path.startswith(f"{EXPERIMENTS}/"):
            paths.append(path)
    return paths


def _overridden_groups(content: Any) -> set[str]:
    """Return the groups whose options a file's defaults list overrides, as they stand there."""
    groups = set()
    for entry in content.get("defaults") or [] if isinstance(content, dict) else []:
        for key in entry if isinstance(entry, dict) else ():
            word, _, group = key.partition(" ")
            if word == "override":
                groups.add(group.strip())
    return groups


def _search_path(folders: ConfigFolders) -> str:
    """Return an override that adds the folders after the first: Hydra has no other public way."""
    quoted = [_quoted(f"file://{path}") for path in folders.configs[1:]]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def nested(content: Any, path: str) -> Any:
    """Return a value below the keys of a dotted path: 1 at "a.b" is {"a": {"b": 1}}."""
    for part in reversed(path.split(".") if path else []):
        content = {part: content}
    return content


def has_key(content: Any, parts: list[str]) -> bool:
    """Whether nested dictionaries and lists have a key."""
    for part in parts:
        if isinstance(content, list) and part.isdecimal() and int(part) < len(content):
            content = content[int(part)]
        elif isinstance(content, dict) and part in content:
            content = content[part]
        else:
            return False
    return True


def dotted_items(value: Any) -> dict[str, Any]:
    """Return every dotted key below a dictionary or list with its value, parents before their
    children."""
    items = dict(walk(value))
    del items[""]  # the value itself
    return items
