"""What a released config.json says, as the nodes of owlfuse's four parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from owlfuse.artifacts.released.vision import clip_node, present, siglip_node
from owlfuse.core.errors import DataError

FAMILIES = {"mplug-owl": "owl1", "mplug_owl2": "owl2", "mplugowl3": "owl3"}

LLM_FIELDS = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *(
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
    ),
)
OWN_LLM_FIELDS = {
    "llama": ("attention_bias", "mlp_bias"),
    "qwen2": ("use_sliding_window", "sliding_window", "max_window_layers"),
}


def family_of(folder: Path, config: dict[str, Any]) -> str:
    """owl1, owl2 or owl3. Raises DataError for another model."""
    found = config.get("model_type")
    if found not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise DataError(
            f"{folder / 'config.json'}: model_type is {found}, and is one of {known} in a "
            "released mPLUG-Owl"
        )
    return FAMILIES[found]


def nodes_of(
    folder: Path, family: str, config: dict[str, Any], keys: set[str], dtype: str
) -> dict[str, dict[str, Any]]:
    """The nodes of vision, connector, fusion and llm, plain enough for a yaml.

    Args:
        keys: names of the tensors, which tell mPLUG-Owl3's gate and its connector.
        dtype: of the LLM.
    """
    fusion: dict[str, Any]
    if family == "owl1":
        vision = clip_node(folder, config.get("vision_config") or {}, image_size=224)
        own = config.get("visual_abstractor_config") or {}
        connector = abstractor_node(
            {"intermediate_size": 4096, **own}, config.get("num_query_tokens", 64), positions=False
        )
        fusion = {"_target_": "owlfuse.model.fusion.concat.Concat"}
    elif family == "owl2":
        visual = config.get("visual_config") or {}
        vision = clip_node(folder, visual.get("visual_model") or {}, image_size=448)
        own = {"intermediate_size": 2816, **(visual.get("visual_abstractor") or {})}
        connector = abstractor_node(own, own.get("num_learnable_queries", 64), positions=True)
        fusion = {"_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"}
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
    if family == "owl1":
        text = config.get("text_config") or {}
        if text.get("model_type", "llama") != "llama":
            found = text["model_type"]
            raise DataError(
                f"{folder / 'config.json'}: text_config.model_type is {found}, and mPLUG-Owl1 "
                "runs on a llama"
            )
    else:
        text = config
    llm = llm_node("qwen2" if family == "owl3" else "llama", text)
    return {
        "vision": vision,
        "connector": connector,
        "fusion": fusion,
        "llm": {**llm, "dtype": dtype},
    }


def abstractor_node(own: dict[str, Any], queries: int, positions: bool) -> dict[str, Any]:
    """The abstractor's; what the configuration lacks has the default of the released code."""
    return {
        "_target_": "owlfuse.model.connectors.abstractor.Abstractor",
        "queries": queries,
        "layers": own.get("num_hidden_layers", 6),
        "heads": own.get("num_attention_heads", 16),
        "hidden": own["intermediate_size"],
        "positions": positions,
        "eps": own.get("layer_norm_eps", 1e-6),
    }


def vision2text_node(keys: set[str]) -> dict[str, Any]:
    """mPLUG-Owl3's connector: one linear layer (240728), or linear layers with GELU between them
    (241101)."""
    if "vision2text_model.weight" in keys:
        return {"_target_": "owlfuse.model.connectors.linear.LinearConnector"}
    depth = sum(re.fullmatch(r"vision2text_model\.\d+\.weight", key) is not None for key in keys)
    return {"_target_": "owlfuse.model.connectors.mlp.MLPConnector", "depth": depth or 2}


def gate_of(keys: set[str]) -> str:
    """mPLUG-Owl3's gate: a `gate_proj` is that of the paper, a `gate` the vector of 240728,
    neither the 241101 form."""
    endings = {key.partition(".self_attn.")[2] for key in keys}
    if "gate_proj.weight" in endings:
        return "adaptive"
    return "static" if "gate" in endings else "fused"


def llm_node(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """The LLM's. What the configuration lacks has transformers' default."""
    fields = {name: text.get(name) for name in (*LLM_FIELDS, *OWN_LLM_FIELDS[model_type])}
    fields = {"model_type": model_type, **present(fields), "rope_parameters": rope_of(text)}
    fields.setdefault("vocab_size", AutoConfig.for_model(model_type).vocab_size)
    return {"_target_": "owlfuse.model.llm.load_llm", "config": fields}


def rope_of(text: dict[str, Any]) -> dict[str, Any]:
    """transformers' rotary parameters from the older `rope_theta` and `rope_scaling`."""
    rope = {
        "rope_theta": float(text.get("rope_theta") or 10000.0),
        **(text.get("rope_scaling") or {}),
    }
    rope |= text.get("rope_parameters") or {}
    kind = rope.pop("type", None)
    return {**rope, "rope_type": rope.get("rope_type") or kind or "default"}
