"""What a released config.json says, as the nodes of owlfuse's four parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from owlfuse.artifacts.released.vision import clip_node, llava_node, present, siglip_node
from owlfuse.core.errors import DataError

FAMILIES = {"mplug-owl": "owl1", "mplug_owl2": "owl2", "mplugowl3": "owl3", "llava": "llava"}

LLM_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
)
FAMILY_LLM_FIELDS = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": ("sliding_window",),
    "qwen2": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}
LLMS = {
    "owl1": ("llama",),
    "owl2": ("llama",),
    "owl3": ("qwen2",),
    "llava": ("llama", "mistral", "qwen2"),
}
"""The LLMs that a model of a family may have."""


def family_of(folder: Path, config: dict[str, Any]) -> str:
    """Returns owl1, owl2, owl3 or llava. Raises DataError for another model."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise DataError(
            f"{folder / 'config.json'}: model_type is {model_type}, and is one of "
            f"{', '.join(FAMILIES)} in a folder that can be imported"
        )
    return FAMILIES[model_type]


def nodes_of(
    folder: Path,
    family: str,
    config: dict[str, Any],
    keys: set[str],
    dtype: str,
) -> dict[str, dict[str, Any]]:
    """Returns the nodes of vision, connector, fusion and llm, plain enough for a yaml.

    Args:
        keys: names of the tensors, which tell mPLUG-Owl3's gate and its connector.
        dtype: of the LLM.
    """
    fusion: dict[str, Any]
    if family == "owl1":
        vision = clip_node(folder, config.get("vision_config") or {}, image_size=224)
        abstractor = {"intermediate_size": 4096, **(config.get("visual_abstractor_config") or {})}
        queries = config.get("num_query_tokens", 64)
        connector = abstractor_node(abstractor, queries, positions=False)
        fusion = {"_target_": "owlfuse.model.fusion.concat.Concat"}
    elif family == "owl2":
        visual = config.get("visual_config") or {}
        vision = clip_node(folder, visual.get("visual_model") or {}, image_size=448)
        abstractor = {"intermediate_size": 2816, **(visual.get("visual_abstractor") or {})}
        queries = abstractor.get("num_learnable_queries", 64)
        connector = abstractor_node(abstractor, queries, positions=True)
        fusion = {"_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"}
    elif family == "llava":
        vision = llava_node(folder, config)
        connector = {"_target_": "owlfuse.model.connectors.mlp.MLPConnector", "depth": 2}
        fusion = {"_target_": "owlfuse.model.fusion.concat.Concat"}
    else:
        vision = siglip_node(folder, config.get("vision_config"))
        connector = vision2text_node(keys)
        # released ones count from 1
        layers = sorted(layer - 1 for layer in config.get("hyper_layers", [1, 9, 17, 25]))
        fusion = {
            "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
            "layers": layers,
            "gate": gate_of(keys),
        }
    text, text_family = config, LLMS[family][0]
    # the others have the LLM's fields beside their own
    if family in ("owl1", "llava"):
        text = config.get("text_config") or {}
        text_family = text.get("model_type", text_family)
        if text_family not in LLMS[family]:
            raise DataError(
                f"{folder / 'config.json'}: text_config.model_type is {text_family}, expected "
                f"{' or '.join(LLMS[family])}"
            )
    # transformers ties the embeddings by the outer configuration too
    if family == "llava" and config.get("tie_word_embeddings"):
        text = {**text, "tie_word_embeddings": True}
    llm = llm_node(text_family, text)
    return {
        "vision": vision,
        "connector": connector,
        "fusion": fusion,
        "llm": {**llm, "dtype": dtype},
    }


def abstractor_node(config: dict[str, Any], queries: int, positions: bool) -> dict[str, Any]:
    """Returns the abstractor's node; keys that the configuration lacks have the defaults of the
    released code."""
    return {
        "_target_": "owlfuse.model.connectors.abstractor.Abstractor",
        "queries": queries,
        "layers": config.get("num_hidden_layers", 6),
        "heads": config.get("num_attention_heads", 16),
        "hidden": config["intermediate_size"],
        "positions": positions,
        "eps": config.get("layer_norm_eps", 1e-6),
    }


def vision2text_node(keys: set[str]) -> dict[str, Any]:
    """Returns mPLUG-Owl3's connector: one linear layer (240728), or linear layers with GELU between
    them (241101)."""
    # config.json does not say which of the two it is
    if "vision2text_model.weight" in keys:
        return {"_target_": "owlfuse.model.connectors.linear.LinearConnector"}
    depth = sum(re.fullmatch(r"vision2text_model\.\d+\.weight", key) is not None for key in keys)
    return {"_target_": "owlfuse.model.connectors.mlp.MLPConnector", "depth": depth or 2}


def gate_of(keys: set[str]) -> str:
    """Returns mPLUG-Owl3's gate: a `gate_proj` is that of the paper, a `gate` the vector of 240728,
    neither the 241101 form."""
    # the forms differ by their tensors alone
    endings = {key.partition(".self_attn.")[2] for key in keys}
    if "gate_proj.weight" in endings:
        return "adaptive"
    return "static" if "gate" in endings else "fused"


def llm_node(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """Returns the LLM's node. Keys that the configuration lacks have transformers' defaults."""
    fields = {name: text.get(name) for name in (*LLM_FIELDS, *FAMILY_LLM_FIELDS[model_type])}
    fields = {"model_type": model_type, **present(fields), "rope_parameters": rope_of(text)}
    # null stands for attention without a window, and where it is missing the default holds
    if "sliding_window" in text:
        fields["sliding_window"] = text["sliding_window"]
    # older configurations leave defaults out
    fields.setdefault("vocab_size", AutoConfig.for_model(model_type).vocab_size)
    return {"_target_": "owlfuse.model.llm.load_llm", "config": fields}


def rope_of(text: dict[str, Any]) -> dict[str, Any]:
    """Returns transformers' rotary parameters from the older `rope_theta` and `rope_scaling`."""
    # configurations from before it was an option have none: it was 10000
    rope = {
        "rope_theta": float(text.get("rope_theta") or 10000.0),
        **(text.get("rope_scaling") or {}),
    }
    rope |= text.get("rope_parameters") or {}
    # the older name of rope_type
    kind = rope.pop("type", None)
    return {**rope, "rope_type": rope.get("rope_type") or kind or "default"}
