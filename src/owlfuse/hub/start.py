"""`init_from`: a run that starts from an exported or imported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.config import ConfigError, compose
from owlfuse.hub.configuration import OwlfuseConfig
from owlfuse.hub.export import check_exported, load_exported
from owlfuse.model import MultimodalLM
from owlfuse.types import DataError


def adopt_parts(config: DictConfig) -> None:
    """Puts the parts of the folder `init_from` into the configuration, in place of those it has by default.

    Raises:
        ConfigError: no such folder, or the configuration asks for a part that is neither the default nor the folder's.
    """
    try:
        nodes = OwlfuseConfig.from_pretrained(check_exported(Path(config.init_from))).nodes()
    except DataError as error:
        raise ConfigError(f"init_from: {error}") from error
    default = compose(["experiment=null"]).model
    for part, node in nodes.items():
        asked, usual, given = (kind_of(OmegaConf.create(n)) for n in (config.model[part], default[part], node))
        if asked not in (usual, given):
            raise ConfigError(f"init_from: {config.init_from} has {part} {given}, and {asked} is asked for; leave it out")
    llm = {**config.model.llm, "pretrained": None, "config": nodes["llm"]["config"]}
    with open_dict(config):
        config.model.update({**nodes, "llm": llm})


def kind_of(node: DictConfig) -> str:
    """What a part is, in a word or two: its class with the backbone's name, the gate or the LLM's type."""
    details = (node.get("name"), node.get("gate"), node.get("pretrained") if node.get("config") is None else None)
    own = OmegaConf.select(node, "config.model_type")
    return " ".join(str(d) for d in (node["_target_"].rpartition(".")[2], *details, own) if isinstance(d, str))


def load_base(folder: str, llm: dict[str, Any], vocab_size: int) -> MultimodalLM:
    """The folder's model for training: float32, LoRA's updates folded in, embeddings for at least `vocab_size` tokens.

    Args:
        llm: the LLM's node, for how it computes (`attention`, `gradient_checkpointing`).
    """
    model = load_exported(Path(folder), merge=True, attention=llm.get("attention", "sdpa"))[0].model.float()
    if model.llm.get_input_embeddings().num_embeddings < vocab_size:
        model.llm.resize_token_embeddings(vocab_size)
    if llm.get("gradient_checkpointing"):
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()
