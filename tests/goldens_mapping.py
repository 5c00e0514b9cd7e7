"""The released goldens as our own parts: a mapping of key names, and of the inputs' conventions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import HYPERATTENTION
from owlfuse.connectors.abstractor import Abstractor
from owlfuse.llm import load_llm
from owlfuse.model import MultimodalLM, make_part
from owlfuse.types import Batch, VisualTokens

FOLDER = Path(__file__).parent / "goldens"
FAMILIES = ("owl1", "owl2", "owl3_adaptive", "owl3_static", "owl3_fused")

# released -> ours, within a decoder layer
LLM_NAMES = (
    (r"\.multiway\.0\.", ".text."),
    (r"\.multiway\.1\.", ".vision."),
    (r"\.v_kv_proj\.", ".visual.kv_proj."),
    (r"self_attn\.gate_proj\.", "self_attn.visual.gate_proj."),
    (r"self_attn\.gate$", "self_attn.visual.gate"),
)
ABSTRACTOR_NAMES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "query_norm": "norm1",
    "image_norm": "normk",
    "out": "output.out_proj",
    "mlp_norm": "output.norm2",
    "mlp.w1": "output.mlp.w1",
    "mlp.w2": "output.mlp.w2",
    "mlp.w3": "output.mlp.w3",
    "mlp.norm": "output.mlp.ffn_ln",
}


def read(family: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """config.json, the weights, and what came in and out."""
    folder = FOLDER / family
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors")


def model_of(family: str) -> MultimodalLM:
    """The golden's LLM and fusion, with its weights, for visual tokens given by hand."""
    config, weights, io = read(family)
    text = config.get("text_config", config)
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields = {name: text[name] for name in (*kept, "vocab_size", "rms_norm_eps", "max_position_embeddings")}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": text.get("rope_theta", 10000.0)}
    fields["model_type"] = "qwen2" if family.startswith("owl3") else "llama"
    if family.startswith("owl3"):
        layers = [layer - 1 for layer in config["hyper_layers"]]
        node = {"_target_": HYPERATTENTION, "layers": layers, "gate": family.removeprefix("owl3_")}
    else:
        name = {"owl1": "concat.Concat", "owl2": "modality_adaptive.ModalityAdaptive"}[family]
        node = {"_target_": f"owlfuse.fusion.{name}"}
    tokens = visual_of(family, io).shape[1]
    llm = load_llm(text["vocab_size"], config=fields)
    model = MultimodalLM(nn.Identity(), nn.Identity(), make_part("fusion", {"fusion": node}, connector_tokens=tokens), llm)
    prefix = "" if family == "owl2" else "language_model."
    model.llm.load_state_dict(llm_weights(weights, prefix))
    return model.eval()


def llm_weights(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The released LLM's weights under our names."""
    out = {}
    for name, value in weights.items():
        ours = name.removeprefix(prefix)
        if re.match(r"(lm_head|model\.(embed_tokens|norm|layers))\.", ours) and "rotary_emb" not in ours:
            for released, replacement in LLM_NAMES:
                ours = re.sub(released, replacement, ours)
            out[ours] = value
    return out


def visual_of(family: str, io: dict[str, Tensor]) -> Tensor:
    """(N, Q, D) as they meet the LLM. owl2's last image is that which the released code uses up for the row without one."""
    if family.startswith("owl3"):
        return io["projected_features"]
    return io["abstractor_tokens"][:3] if family == "owl2" else io["abstractor_tokens"]


def inputs_of(family: str, config: dict[str, Any], io: dict[str, Tensor]) -> tuple[Batch, VisualTokens]:
    """The golden's rows as a batch; rows hold one, two and no images."""
    tokens = visual_of(family, io)
    count = tokens.shape[1]
    rows, labels, starts = [], [], []
    for ids, wanted in zip(io["input_ids"].tolist(), io["labels"].tolist()):
        rows.append([])
        labels.append([])
        starts.append([])
        for token, label in zip(ids, wanted):
            if family == "owl1":
                width, is_image, is_first = 1, token == -1, token == -1 and starts_run(rows[-1], starts[-1], count)
            else:
                is_image = is_first = token == (-200 if family == "owl2" else config["image_token_id"])
                width = count if is_image and family == "owl2" else 1
            if is_first:
                starts[-1].append(len(rows[-1]))
            rows[-1] += [0 if is_image and token < 0 else token] * width
            labels[-1] += [-100 if is_image else label] * width
    length = max(map(len, rows))
    is_image = torch.zeros(len(rows), length, dtype=torch.bool)
    taken = 1 if family.startswith("owl3") else count
    image_index, image_positions = torch.full((len(rows), 2), -1), torch.full((len(rows), 2), length)
    number = 0
    for b, found in enumerate(starts):
        for i, start in enumerate(found):
            is_image[b, start : start + taken] = True
            image_index[b, i], image_positions[b, i] = number, start
            number += 1
    pad = [length - len(row) for row in rows]
    batch = Batch(
        input_ids=torch.tensor([row + [0] * p for row, p in zip(rows, pad)]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * p for row, p in zip(rows, pad)]),
        labels=torch.tensor([row + [-100] * p for row, p in zip(labels, pad)]),
        placeholder=is_image,
        pixel_values=io["images"][:number],
        image_mask=torch.ones(number, dtype=torch.bool),
        image_index=image_index,
        image_positions=image_positions,
    )
    return batch, VisualTokens(tokens, image_index, image_positions)


def starts_run(row: list[int], starts: list[int], count: int) -> bool:
    """Whether the next position, one of an image's, is the first of its image."""
    return not starts or len(row) >= starts[-1] + count


def abstractor_of(family: str) -> Abstractor:
    """The golden's abstractor with its weights."""
    config, weights, _ = read(family)
    own = config.get("visual_abstractor_config") or config["visual_config"]["visual_abstractor"]
    prefix = "abstractor." if family == "owl1" else "model.visual_abstractor."
    abstractor = Abstractor(
        in_width=own["hidden_size"],
        out_width=64,
        patches=17,
        grid=(4, 4),
        queries=8,
        layers=own["num_hidden_layers"],
        heads=own["num_attention_heads"],
        hidden=own["intermediate_size"],
        positions=family == "owl2",
    )
    ours = {
        "queries": weights["query_tokens" if family == "owl1" else f"{prefix}query_embeds"],
        "end_token": weights[f"{prefix}vit_eos"],
        "proj.weight": weights[f"{prefix}visual_fc.weight"],
        "proj.bias": weights[f"{prefix}visual_fc.bias"],
    }
    for layer in range(own["num_hidden_layers"]):
        for name, released in ABSTRACTOR_NAMES.items():
            for kind in ("weight", "bias"):
                key = f"{prefix}encoder.layers.{layer}.crossattention.{released}.{kind}"
                ours[f"layers.{layer}.{name}.{kind}"] = weights[key]
    tables = {name: table for name, table in abstractor.state_dict().items() if name.endswith("_positions")}
    abstractor.load_state_dict({**ours, **tables})
    return abstractor
