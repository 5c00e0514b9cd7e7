"""`init_from`: a run that starts from an exported or imported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.config.build import to_dict
from owlfuse.config.compose import compose, origin_of
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.folder_kinds import check_exported


def adopt_parts(config: DictConfig) -> None:
    """Puts the parts of the folder `init_from` into the configuration, in place of those it has by
    default. Only the size of the pictures may be asked for anew, outside of the group's own yaml:
    `load_base` then resamples position embeddings.

    Raises:
        ConfigError: no such folder, or the configuration asks for a part that is neither the
            default nor the folder's.
    """
    try:
        nodes = OwlfuseConfig.from_pretrained(check_exported(Path(config.init_from))).nodes()
    except DataError as error:
        raise ConfigError(f"init_from: {error}") from error
    default = to_dict(compose(["experiment=null"]).model)
    asked = to_dict(config.model)
    for part in ("vision", "connector"):  # how a part computes may be asked for
        if (
            "gradient_checkpointing" in asked[part]
            and asked[part]["_target_"] == nodes[part]["_target_"]
        ):
            nodes[part] = {
                **nodes[part],
                "gradient_checkpointing": asked[part]["gradient_checkpointing"],
            }
    # asked for, and not the group's own
    if Path(origin_of(config, "model.vision.image_size")).parent.name != "vision":
        nodes["vision"] = {**nodes["vision"], "image_size": asked["vision"].get("image_size")}
    for part, node in nodes.items():
        differing = differences(asked[part], default[part], node)
        if part == "llm":
            differing |= differences(
                asked[part].get("config") or {}, default[part]["config"], node["config"]
            )
        if differing:
            key, (found, wanted) = next(iter(differing.items()))
            raise ConfigError(
                f"init_from: {config.init_from} has model.{part} with {key} {found}, and {wanted} "
                "is asked for; leave it out"
            )
    if (
        OmegaConf.is_missing(config.data, "tokenizer")
        or Path(origin_of(config, "data.tokenizer")).parent.name == "data"
    ):
        # not asked for: its own, whose ids its weights know
        config.data.tokenizer = config.init_from
    llm = {**asked["llm"], "pretrained": None, "config": nodes["llm"]["config"]}
    with open_dict(config):
        config.model.update({**nodes, "llm": llm})


def differences(
    asked: dict[str, Any], usual: dict[str, Any], given: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The keys that are asked for otherwise than by default and than the folder has them: what it
    has, and what is asked for. How a part computes or is loaded is not among them."""
    free = (
        "pretrained",
        "weights",
        "gguf_file",
        "dtype",
        "attention",
        "gradient_checkpointing",
        "config",
    )
    names = [
        name
        for name in asked
        if name not in free and asked[name] != usual.get(name) and name in {*given, "_target_"}
    ]
    found = {name: (given[name], asked[name]) for name in names if asked[name] != given[name]}
    if (
        asked.get("pretrained") not in (None, False, usual.get("pretrained"))
        and "_target_" in asked
    ):
        found["pretrained"] = (None, asked["pretrained"])
    return found
