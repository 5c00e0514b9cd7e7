"""`init_from`: a run that starts from an exported or imported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.artifacts.checking import build_errors, check_files
from owlfuse.artifacts.hf.configuration import read_configuration
from owlfuse.config.build import to_dict
from owlfuse.config.check import nodes_of, parameters_of
from owlfuse.config.compose import asks_for, compose, origin_of
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.folder_kinds import check_exported
from owlfuse.model.parts import compute_only, essential, loading_options


def adopt_parts(config: DictConfig) -> None:
    """Puts the parts of the folder `init_from` into the configuration, in place of the default
    ones. Only how a part computes and the size of the pictures may differ: `load_base` then
    resamples position embeddings.

    Raises:
        ConfigError: no such folder, or the configuration asks for a part that is not the folder's:
            by the command line or the experiment, or by a value that is not the default.
    """
    try:
        folder = check_exported(Path(config.init_from))
        # its tokenizer is read before its weights
        check_files(folder)
        with build_errors(folder / "config.json"):
            nodes = read_configuration(folder).nodes()
    except DataError as error:
        raise ConfigError(f"init_from: {error}") from error
    # a key at its default is not the user's wish, unless something of the user's sets it
    default = to_dict(compose(["experiment=null"]).model)
    requested = to_dict(config.model)
    for part in ("vision", "connector"):
        if requested[part]["_target_"] == nodes[part]["_target_"]:
            options = compute_only(requested[part]) & set(requested[part])
            computing = {name: requested[part][name] for name in options}
            nodes[part] = {**nodes[part], **computing}
    # the size of the group's own yaml is a default, not a wish
    if Path(origin_of(config, "model.vision.image_size")).parent.name != "vision":
        nodes["vision"] = {**nodes["vision"], "image_size": requested["vision"].get("image_size")}
    for part, node in nodes.items():
        unasked = without_asked(config, f"model.{part}", requested[part], default[part])
        conflicts = find_conflicts(requested[part], unasked, node)
        if part == "llm":
            # its fields one by one: most are the folder's, and a few may be set
            llm_config = requested[part].get("config") or {}
            unasked = without_asked(config, "model.llm.config", llm_config, default[part]["config"])
            conflicts |= find_conflicts(llm_config, unasked, node["config"])
        if conflicts:
            key, (in_folder, in_config) = next(iter(conflicts.items()))
            raise ConfigError(
                f"init_from: {config.init_from} has model.{part} with {key} {in_folder}, and "
                f"{in_config} is asked for; leave it out"
            )
    tokenizer_is_default = (
        OmegaConf.is_missing(config.data, "tokenizer")
        or Path(origin_of(config, "data.tokenizer")).parent.name == "data"
    )
    if tokenizer_is_default:
        # the folder's, whose ids its weights were trained with
        config.data.tokenizer = config.init_from
    llm = {**requested["llm"], "pretrained": None, "config": nodes["llm"]["config"]}
    # the folder's parts may have keys that the group's yaml lacks
    with open_dict(config):
        config.model.update({**nodes, "llm": llm})


def without_asked(
    config: DictConfig, path: str, requested: dict[str, Any], default: dict[str, Any]
) -> dict[str, Any]:
    """Returns the defaults of the keys at a path without those that the user asks for. Who asks for
    an option of a part asks for its class."""
    asked = {name for name in requested if asks_for(config, f"{path}.{name}")}
    # which may differ, and of which the group's own yaml asks for nothing
    asked.discard("image_size")
    if asked:
        asked.add("_target_")
    return {name: value for name, value in default.items() if name not in asked}


def find_conflicts(
    requested: dict[str, Any], default: dict[str, Any], in_folder: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns the keys that the configuration has otherwise than by default and than the folder:
    the folder's value, and the configuration's. How a part computes or is loaded is left out."""
    # an export holds plain weights, and the run says itself whether it puts them in 4 bits
    free = {"config", "quantization"}
    if "_target_" in requested:
        free |= compute_only(requested) | loading_options(requested)
    folder_values = in_folder
    # what a folder means that lacks a key, since a later release added it
    if "_target_" in in_folder:
        folder_values = {**defaults_of(get_object(in_folder["_target_"])), **in_folder}
    conflicts: dict[str, tuple[Any, Any]] = {}
    for name, value in requested.items():
        if name in free or name not in {*folder_values, "_target_"}:
            continue
        # of a backbone that is made of others, each has its own weights
        value = essential(value)
        if value != essential(default.get(name)) and value != essential(folder_values[name]):
            conflicts[name] = (folder_values[name], value)
    if "_target_" in requested:
        # other weights than the folder's were asked for in words
        pretrained = requested.get("pretrained")
        if pretrained not in (None, False, default.get("pretrained")):
            conflicts["pretrained"] = (None, pretrained)
        for path, node in nodes_of(requested):
            # of a backbone that is made of others
            if path and "_target_" in node and node.get("pretrained"):
                conflicts[f"{path}.pretrained"] = (None, node["pretrained"])
    return conflicts


def defaults_of(part: Any) -> dict[str, Any]:
    """Returns the defaults of a class's or a function's arguments, those that a class passes on to
    its base among them."""
    parameters = parameters_of(part) or {}
    defaults: dict[str, Any] = {}
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if passes_on and isinstance(part, type):
        for base in part.__bases__:
            defaults |= defaults_of(base)
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            defaults[name] = parameter.default
    return defaults
