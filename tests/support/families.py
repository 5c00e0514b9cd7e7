"""Tiny configurations of many families of LLMs."""

import inspect
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 16},
    "smollm3": {
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    },
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "olmoe": EXPERTS,
    "hunyuan_v1_dense": {"head_dim": 16},
    "exaone_moe": {**EXPERTS, "moe_intermediate_size": 32},
}
"""All of whose layers every fusion can serve."""
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "glm": {"head_dim": 16},
    "ministral3": {},
    "gemma": {"head_dim": 16},
    "olmo": {},
    "glm4": {"head_dim": 16},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "starcoder2": {},
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "ernie4_5": {},
    "seed_oss": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "arcee": {},
    "granitemoe": LOCAL_EXPERTS,
    "phimoe": {"num_local_experts": 4},
    "bitnet": {},
    "nanochat": {},
    "cwm": {"sliding_window": 8},
    "doge": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "dots1": {"moe_intermediate_size": 32, "n_shared_experts": 1, **ROUTED_EXPERTS, "head_dim": 16},
    "glm4_moe": {"moe_intermediate_size": 32, **ROUTED_EXPERTS, "head_dim": 16},
    "minimax_m2": {**LOCAL_EXPERTS, "head_dim": 16},
    "mellum": {},
}
NO_PACKING: dict[str, dict[str, Any]] = {
    "afmoe": {**EXPERTS, "moe_intermediate_size": 32},
    "granitemoehybrid": {
        **LOCAL_EXPERTS,
        "layer_types": ["attention"] * 4,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
}
"""Whose forward hands no position ids to its masks."""
NO_HYPERATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "nemotron": ({}, "hand no keyword arguments"),
    "stablelm": ({}, "hand no keyword arguments"),
    "diffllama": ({}, "calls transformers' attention functions 2 times"),
    "olmoe": ({**EXPERTS, "clip_qkv": 2.0}, "changes the values after their projection"),
}
"""What hyperattention refuses, and why."""


def fields_of(family: str, **fields: Any) -> dict[str, Any]:
    """The configuration of a tiny LLM of a family."""
    return {"model_type": family, **SMALL, **fields}


SIZES: dict[str, Any] = {
    **SMALL,
    **EXPERTS,
    **LOCAL_EXPERTS,
    "head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "state_size": 8,
    "rotary_dim": 8,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 128,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "n_embd": 64,
    "d_model": 64,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_inner": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "n_positions": 256,
}
"""Of every name that a configuration may have for one."""
PADDED: dict[str, Any] = {"pad_token_id": 1}
"""For families that count positions by their padding."""
HYBRID = ["linear_attention", "hybrid"] * 2
OF_FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "camembert": PADDED,
    "data2vec-text": PADDED,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots3_note": {
        "audio_config": {"adapter_out_dim": 64},
        "vision_config": {"adapter_out_dim": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    # released ones have a factor, and the default of 1 would hide who applies it
    "falcon_h1": {"mamba_d_ssm": 128, "embedding_multiplier": 5.66},
    "gemma3n": {
        "audio_config": {"conf_num_hidden_layers": 1, "hidden_size": 64},
        "vision_config": {"architecture": "test_vit"},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "modernbert-decoder": PADDED,
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "hidden_size": 64},
        "vision_config": {"num_hidden_layers": 1},
    },
    "prophetnet": PADDED,
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "roberta": PADDED,
    "roberta-prelayernorm": PADDED,
    "xlm-roberta": PADDED,
    "xlm-roberta-xl": PADDED,
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}
"""What fits together in a family only with other sizes than SIZES."""
OPTIONAL = ("sliding_window", "num_experts", "q_lora_rank", "moe_intermediate_size")
"""Sizes that a family is without where its usual configuration has none."""


def small_fields(family: str) -> dict[str, Any]:
    """The configuration of a tiny LLM of any family, in which every type of its layers occurs."""
    config_class = CONFIG_MAPPING[family]
    try:
        usual = vars(config_class())
    except StrictDataclassError:  # gemma4_assistant refuses its own defaults
        usual = {}
    known = set(inspect.signature(config_class).parameters) | set(usual)
    fields = {name: size for name, size in SIZES.items() if name in known}
    for name in OPTIONAL:
        if usual.get(name) is None:
            fields.pop(name, None)
    if types := usual.get("layer_types"):
        different = list(dict.fromkeys(types))
        fields["layer_types"] = (different * 4)[:4]
    # with latent attention, head_dim is the width of the rotated part, and heads have no groups
    if "qk_rope_head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    # the LLM of a model that reads pictures
    if text_config := usual.get("text_config"):
        fields["text_config"] = small_fields(text_config.model_type)
    return {"model_type": family, **fields, **OF_FAMILY.get(family, {})}
