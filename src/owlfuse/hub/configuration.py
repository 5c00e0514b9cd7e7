"""config.json of an exported model."""

from __future__ import annotations

import sys
from typing import Any

from hydra.utils import get_object
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from owlfuse.types import DataError

PARTS = ("vision", "connector", "fusion")


class OwlfuseConfig(PreTrainedConfig):
    """An exported model: the nodes of three parts as in a run's configuration, and transformers' configuration of the LLM.

    Args:
        vision, connector, fusion: nodes with a `_target_` in owlfuse, or in a module that is imported already.
        text_config: the LLM's, a dictionary with its `model_type` or a configuration.
        image_token_id: the id of `<image>`, which stands at every position that an image takes.
        tokens_per_image: positions that an image takes.
    """

    model_type = "owlfuse"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        text_config: Any = None,
        image_token_id: int | None = None,
        tokens_per_image: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision = vision
        self.connector = connector
        self.fusion = fusion
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The model's four nodes, for `owlfuse.model.assemble`; no weights are asked for by them.

        Raises:
            DataError: a node is missing, or names something that is no part of owlfuse and not imported.
        """
        nodes = {name: getattr(self, name) for name in PARTS}
        for name, node in nodes.items():
            check_target(name, node)
        kept = {key: value for key, value in nodes["vision"].items() if key != "weights"}
        nodes["vision"] = kept | ({"pretrained": False} if "pretrained" in kept else {})
        attention = getattr(self.text_config, "_attn_implementation", None) or "sdpa"
        llm = {**llm_node(self.text_config), "attention": attention}
        dtype = self.text_config.dtype
        if dtype is not None and dtype == self.dtype:  # all of the model is in it, as after a run in bf16-true
            llm["dtype"] = str(dtype).removeprefix("torch.")
        return {**nodes, "llm": llm}


def check_target(name: str, node: Any) -> None:
    """A folder from elsewhere may not have Python import what it likes: only owlfuse's own classes and those of modules that
    are imported already are made."""
    target = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(target, str):
        raise DataError(f"config.json: {name} has no _target_, so this is no folder that owlfuse exported")
    module, _, _ = target.rpartition(".")
    if module.partition(".")[0] != "owlfuse" and module not in sys.modules:
        remedy = f"if you trust it, import {module} first, or write: owlfuse --trust {module} ..."
        raise DataError(f"config.json: {name} is a {target}, which is not of owlfuse; {remedy}")
    part = get_object(target)
    if not (isinstance(part, type) and issubclass(part, nn.Module)):
        raise DataError(f"config.json: {name}: {target} is no part of a model")


def llm_node(text_config: PreTrainedConfig) -> dict[str, Any]:
    """The node that makes an LLM of this configuration with random weights."""
    from owlfuse.llm import known_fields  # here, since it imports transformers' models, which are not there yet

    known = known_fields(type(text_config)) - {"transformers_version", "architectures", "dtype"}
    fields = {k: v for k, v in text_config.to_diff_dict().items() if k in known and not k.startswith("_")}
    return {"_target_": "owlfuse.llm.load_llm", "config": {**fields, "model_type": text_config.model_type}}
