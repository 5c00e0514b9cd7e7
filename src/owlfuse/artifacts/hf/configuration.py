"""config.json of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from owlfuse.config.aliases import with_current_names
from owlfuse.config.check import check_targets
from owlfuse.config.trust import check_backbone, check_names
from owlfuse.core.errors import ConfigError, DataError

PARTS = ("vision", "connector", "fusion")


class OwlfuseConfig(PreTrainedConfig):
    """An exported model: the nodes of three parts as in a run's configuration, and transformers'
    configuration of the LLM.

    Args:
        vision, connector, fusion: nodes with a `_target_` in owlfuse, or in a module that is
            imported already.
        text_config: the LLM's, a dictionary with its `model_type` or a configuration.
        image_token_id: the id of `<image>`, which stands at every position that an image takes.
        tokens_per_image: positions that an image takes.
        llm_trained_in_4_bits: the LLM was held in 4 bits while updates of it were trained; the
            weights here are plain ones.
    """

    model_type = "owlfuse"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    # else transformers would make one without arguments, to save what differs from it
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        text_config: Any = None,
        image_token_id: int | None = None,
        tokens_per_image: int = 1,
        llm_trained_in_4_bits: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        # an older export names classes by the modules that they were in then
        self.vision = with_current_names(vision)
        self.connector = with_current_names(connector)
        self.fusion = with_current_names(fusion)
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.llm_trained_in_4_bits = llm_trained_in_4_bits
        # transformers asks this configuration, too, whether embeddings are tied
        kwargs.setdefault(
            "tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False))
        )
        super().__init__(**kwargs)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The model's four nodes, for `owlfuse.model.multimodal.assemble`; no weights are asked for
        by them.

        Raises:
            DataError: a node is missing, or names something that is not accepted (see
                `owlfuse.config.trust`).
        """
        nodes = {name: getattr(self, name) for name in PARTS}
        check_nodes(nodes, Path(self._name_or_path or ".") / "config.json")
        # the weights are those of this folder
        nodes["vision"] = without_weights(nodes["vision"])
        attention = getattr(self.text_config, "_attn_implementation", None) or "sdpa"
        llm = {**llm_node(self.text_config), "attention": attention}
        dtype = self.text_config.dtype
        # all of the model is in it, as after a run in bf16-true
        if dtype is not None and dtype == self.dtype:
            llm["dtype"] = str(dtype).removeprefix("torch.")
        return {**nodes, "llm": llm}


def read_configuration(folder: Path, **options: Any) -> OwlfuseConfig:
    """Returns the configuration of an exported folder, which knows the folder."""
    config = OwlfuseConfig.from_pretrained(folder, **options)
    # as the models' from_pretrained sets it; without it, names in it would be judged as those of a
    # model in the working folder, where the yamls are the model's and not the user's
    config.name_or_path = str(folder)
    return config


def check_nodes(nodes: dict[str, Any], file: Path) -> None:
    """Checks the names and arguments of the parts in a config.json. Raises DataError."""
    for name in PARTS:
        if not isinstance(nodes.get(name), dict) or "_target_" not in nodes[name]:
            raise DataError(
                f"{file}: {name} has no _target_, so this is no folder that owlfuse exported"
            )
    model = {"model": {name: nodes[name] for name in PARTS}}
    check_names(model, file)
    check_backbone(nodes["vision"], file, hub=False)
    try:
        check_targets(model, lambda path: str(file))
    except ConfigError as error:
        raise DataError(str(error)) from error


def without_weights(node: dict[str, Any]) -> dict[str, Any]:
    """The node of a backbone, and of those that it is made of, without weights of its own."""
    stripped: dict[str, Any] = {}
    for key, value in node.items():
        if key == "pretrained":
            stripped[key] = False
        elif key != "weights":
            # timm's own arguments may have these names, too
            is_group = isinstance(value, dict) and key != "kwargs"
            stripped[key] = without_weights(value) if is_group else value
    return stripped


def llm_node(text_config: PreTrainedConfig) -> dict[str, Any]:
    """The node that makes an LLM of this configuration with random weights."""
    fields = declared(text_config, text_config.to_diff_dict())
    return {"_target_": "owlfuse.model.llm.load_llm", "config": fields}


def declared(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that the class of a configuration, or of one inside of it, declares,
    with its `model_type`: a file of the hub may have others, which transformers keeps unread."""
    # here, since it imports transformers' models, which are not there yet
    from owlfuse.model.llm import config_fields

    names = config_fields(type(config)) - {"transformers_version", "architectures", "dtype"}
    fields: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(config, name, None) if name in config.sub_configs else None
        if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
            fields[name] = declared(inner, value)
        elif name in names and not name.startswith("_"):
            fields[name] = value
    fields["model_type"] = config.model_type
    return fields
