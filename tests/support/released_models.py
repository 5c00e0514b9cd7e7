"""Random checkpoints in the released layouts, written by hand, and what they compute, by slow code
of its own.

N images, P patches, Q queries, Dv vision width, D LLM width, T positions of a row.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from reference_lm import ReferenceLM, Shape

IMAGE = "image"
KINDS = ("owl1", "owl2", "owl3_adaptive", "owl3_static", "owl3_fused")


@dataclass
class Written:
    """A checkpoint and what it is made of."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def to(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Writes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        floats = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.tensors.items()}
        save_file({n: t.contiguous() for n, t in floats.items()}, folder / "model.safetensors")
        return folder

    @property
    def image_size(self) -> int:
        if self.kind == "owl2":
            return self.config["visual_config"]["visual_model"]["image_size"]
        return self.config["vision_config"]["image_size"]


def norm(width: int) -> Tensor:
    return 1 + 0.3 * torch.randn(width)


def linear(tensors: dict[str, Tensor], name: str, inside: int, out: int, bias: bool = True) -> None:
    tensors[f"{name}.weight"] = torch.randn(out, inside) / math.sqrt(inside)
    if bias:
        tensors[f"{name}.bias"] = 0.3 * torch.randn(out)


def layer_norm(tensors: dict[str, Tensor], name: str, width: int) -> None:
    tensors[f"{name}.weight"], tensors[f"{name}.bias"] = norm(width), 0.3 * torch.randn(width)


def write(kind: str, seed: int) -> Written:
    """A model of that kind with sizes drawn from the seed."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    return (write_owl3 if kind.startswith("owl3") else write_owl12)(kind, pick)


def write_owl12(kind: str, pick: random.Random) -> Written:
    """CLIP, abstractor and llama."""
    text = text_fields(kind, pick)
    heads, own_heads, patch, grid = (
        pick.choice([1, 2, 3]),
        pick.choice([2, 4]),
        pick.choice([4, 5]),
        pick.choice([2, 3]),
    )
    width, queries = 8 * heads, pick.choice([2, 3])
    eps = {"layer_norm_eps": pick.choice([1e-6, 1e-5, 1e-2])} if pick.random() < 0.7 else {}
    vision = {
        "hidden_size": width,
        "intermediate_size": pick.choice([11, 29, 47]),
        "num_hidden_layers": pick.choice([1, 2]),
    }
    vision |= {
        "num_attention_heads": heads,
        "image_size": patch * grid,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        **eps,
    }
    own = {
        "hidden_size": width,
        "encoder_hidden_size": width,
        "num_hidden_layers": pick.choice([1, 2]),
        **eps,
    }
    own |= {"num_attention_heads": own_heads, "intermediate_size": pick.choice([9, 21])}
    if kind == "owl1":
        config = {
            "model_type": "mplug-owl",
            "vision_config": vision,
            "visual_abstractor_config": own,
            "text_config": text,
        }
        config["num_query_tokens"] = queries
    else:
        own |= {"num_learnable_queries": queries, "grid_size": grid}
        config = {
            "model_type": "mplug_owl2",
            "visual_config": {"visual_model": vision, "visual_abstractor": own},
            **text,
        }
    tensors: dict[str, Tensor] = {}
    clip_tensors(
        tensors, vision, "vision_model." if kind == "owl1" else "model.vision_model.", grid
    )
    abstractor_tensors(tensors, kind, own, queries, grid, text["hidden_size"])
    llm_tensors(tensors, kind, text, "language_model." if kind == "owl1" else "", [])
    return Written(kind, config, tensors)


def write_owl3(kind: str, pick: random.Random) -> Written:
    """SigLIP, linear layers and qwen2."""
    text = text_fields(kind, pick)
    heads, patch, grid = pick.choice([2, 3]), pick.choice([4, 6]), pick.choice([2, 3])
    width, d = 8 * heads, text["hidden_size"]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "patch_size": patch,
    }
    vision |= {
        "intermediate_size": pick.choice([13, 37, 41]),
        "num_hidden_layers": pick.choice([2, 3]),
    }
    vision["image_size"] = patch * grid + pick.choice([0, patch - 1])
    if pick.random() < 0.5:
        vision["layer_norm_eps"] = pick.choice([1e-6, 1e-5, 1e-2])
        vision["hidden_act"] = pick.choice(["gelu_pytorch_tanh", "gelu", "quick_gelu"])
    config = {"model_type": "mplugowl3", "image_token_id": 7, **text, "vision_config": vision}
    config["hyper_layers"] = pick.choice([[1], [2], [1, 2], [2, 1]])
    tensors: dict[str, Tensor] = {}
    for name, tensor in siglip(vision).state_dict().items():
        tensors["vision_model." + name.removeprefix("vision_model.")] = tensor
    tensors["vision_model.embeddings.position_ids"] = torch.arange(grid * grid)[None]
    linear(
        tensors, "vision2text_model.0" if kind == "owl3_fused" else "vision2text_model", width, d
    )
    if kind == "owl3_fused":
        linear(tensors, "vision2text_model.2", d, d)
    llm_tensors(tensors, kind, text, "language_model.", config["hyper_layers"])
    return Written(kind, config, tensors)


def text_fields(kind: str, pick: random.Random) -> dict[str, Any]:
    """Fields of the LLM. Its `model_type` is not among them."""
    groups, per_group, head = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([4, 6])
    fields = {
        "vocab_size": pick.choice([53, 64]),
        "hidden_size": groups * per_group * head,
        "intermediate_size": pick.choice([23, 40]),
        "num_hidden_layers": 2,
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "rms_norm_eps": pick.choice([1e-6, 1e-2]),
        "max_position_embeddings": pick.choice([64, 128]),
        "rope_theta": pick.choice([10000.0, 300.0]),
        "tie_word_embeddings": pick.random() < 0.5,
        "rope_scaling": None,
    }
    return fields if kind.startswith("owl3") else {**fields, "attention_bias": pick.random() < 0.5}


def clip_tensors(out: dict[str, Tensor], fields: dict[str, Any], p: str, grid: int) -> None:
    width, hidden, patch = fields["hidden_size"], fields["intermediate_size"], fields["patch_size"]
    out[f"{p}embeddings.cls_token"] = torch.randn(1, 1, width)
    out[f"{p}embeddings.patch_embed.weight"] = torch.randn(width, 3, patch, patch) / patch / 2
    out[f"{p}embeddings.position_embedding"] = torch.randn(1, grid * grid + 1, width)
    layer_norm(out, f"{p}embeddings.pre_layernorm", width)
    for i in range(fields["num_hidden_layers"]):
        layer = f"{p}encoder.layers.{i}"
        layer_norm(out, f"{layer}.input_layernorm", width)
        linear(out, f"{layer}.self_attn.query_key_value", width, 3 * width)
        linear(out, f"{layer}.self_attn.dense", width, width)
        layer_norm(out, f"{layer}.post_attention_layernorm", width)
        linear(out, f"{layer}.mlp.fc1", width, hidden)
        linear(out, f"{layer}.mlp.fc2", hidden, width)
    layer_norm(out, f"{p}post_layernorm", width)


def abstractor_tensors(
    out: dict[str, Tensor], kind: str, own: dict[str, Any], queries: int, grid: int, d: int
) -> None:
    width, hidden = own["hidden_size"], own["intermediate_size"]
    p = "abstractor." if kind == "owl1" else "model.visual_abstractor."
    out["query_tokens" if kind == "owl1" else f"{p}query_embeds"] = torch.randn(1, queries, width)
    out[f"{p}vit_eos"] = torch.randn(1, 1, d)
    linear(out, f"{p}visual_fc", width, d)
    for i in range(own["num_hidden_layers"]):
        layer = f"{p}encoder.layers.{i}.crossattention"
        for name in ("query", "key", "value"):
            linear(out, f"{layer}.attention.{name}", width, width)
        if kind == "owl2":
            out[f"{layer}.attention.q_pos_embed"] = torch.tensor(
                [table_row([q], width) for q in range(queries)]
            )
            places = [(column, row) for row in range(grid) for column in range(grid)]
            rows = [[0.0] * width] + [table_row(place, width) for place in places]
            out[f"{layer}.attention.k_pos_embed"] = torch.tensor(rows)
        for name in ("norm1", "normk", "output.norm2"):
            layer_norm(out, f"{layer}.{name}", width)
        layer_norm(out, f"{layer}.output.mlp.ffn_ln", hidden)
        linear(out, f"{layer}.output.out_proj", width, width)
        linear(out, f"{layer}.output.mlp.w1", width, hidden)
        linear(out, f"{layer}.output.mlp.w2", hidden, width)
        linear(out, f"{layer}.output.mlp.w3", width, hidden)


def table_row(place: tuple[int, ...] | list[int], width: int) -> list[float]:
    """Sines, then cosines, of each coordinate, the width shared among them."""
    share = width // len(place)
    out: list[float] = []
    for x in place:
        angles = [x / 10000 ** (i / (share / 2)) for i in range(share // 2)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return out


def llm_tensors(
    out: dict[str, Tensor], kind: str, text: dict[str, Any], p: str, hyper: list[int]
) -> None:
    d, hidden = text["hidden_size"], text["intermediate_size"]
    head = d // text["num_attention_heads"]
    kv = head * text["num_key_value_heads"]
    bias = kind.startswith("owl3") or text["attention_bias"]
    out[f"{p}model.embed_tokens.weight"] = torch.randn(text["vocab_size"], d)
    out[f"{p}model.norm.weight"] = norm(d)
    if not text["tie_word_embeddings"]:
        linear(out, f"{p}lm_head", d, text["vocab_size"], bias=False)
    copies = [".multiway.0", ".multiway.1"] if kind == "owl2" else [""]
    for i in range(text["num_hidden_layers"]):
        layer = f"{p}model.layers.{i}"
        for c in copies:
            out[f"{layer}.input_layernorm{c}.weight"] = norm(d)
            out[f"{layer}.post_attention_layernorm{c}.weight"] = norm(d)
            linear(out, f"{layer}.self_attn.k_proj{c}", d, kv, bias)
            linear(out, f"{layer}.self_attn.v_proj{c}", d, kv, bias)
        linear(out, f"{layer}.self_attn.q_proj", d, d, bias)
        linear(out, f"{layer}.self_attn.o_proj", d, d, bias and not kind.startswith("owl3"))
        linear(out, f"{layer}.mlp.gate_proj", d, hidden, bias=False)
        linear(out, f"{layer}.mlp.up_proj", d, hidden, bias=False)
        linear(out, f"{layer}.mlp.down_proj", hidden, d, bias=False)
        out[f"{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(head // 2)
        if i + 1 in hyper:
            linear(out, f"{layer}.self_attn.v_kv_proj", d, 2 * kv)
            if kind == "owl3_adaptive":
                linear(out, f"{layer}.self_attn.gate_proj", d, d)
            elif kind == "owl3_static":
                out[f"{layer}.self_attn.gate"] = torch.randn(d)


# What they compute, in float64


def siglip(fields: dict[str, Any]) -> SiglipVisionModel:
    """transformers' tower, every number of it away from its initial value."""
    model = SiglipVisionModel(
        SiglipVisionConfig(**{**fields, "attn_implementation": "eager"})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def visual_tokens(written: Written, images: Tensor) -> Tensor:
    """(N, Q, D), as they meet the LLM."""
    weights = {name: tensor.double() for name, tensor in written.tensors.items()}
    if not written.kind.startswith("owl3"):
        return torch.stack(
            [abstract(written, weights, clip(written, weights, image.double())) for image in images]
        )
    tower = siglip(written.config["vision_config"]).double()
    mine = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in weights.items()
        if name.startswith("vision_model.")
    }
    prefix = "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""
    tower.load_state_dict(
        {
            prefix + name: tensor
            for name, tensor in mine.items()
            if name != "embeddings.position_ids"
        }
    )
    features = tower(images.double(), output_hidden_states=True).hidden_states[-2]
    p = "vision2text_model"
    if written.kind != "owl3_fused":
        return features @ weights[f"{p}.weight"].T + weights[f"{p}.bias"]
    inner = features @ weights[f"{p}.0.weight"].T + weights[f"{p}.0.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ weights[f"{p}.2.weight"].T + weights[f"{p}.2.bias"]


def normed(weights: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def project(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.T / math.sqrt(query.shape[-1]), dim=-1) @ value


def clip(written: Written, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """One image -> (P, Dv)."""
    owl1 = written.kind == "owl1"
    fields = (
        written.config["vision_config"] if owl1 else written.config["visual_config"]["visual_model"]
    )
    p, eps, size = (
        "vision_model." if owl1 else "model.vision_model.",
        fields.get("layer_norm_eps", 1e-6),
        fields["patch_size"],
    )
    kernel = weights[f"{p}embeddings.patch_embed.weight"]
    patches = [
        (kernel * image[:, y : y + size, x : x + size]).sum((1, 2, 3))
        for y in range(0, image.shape[1], size)
        for x in range(0, image.shape[2], size)
    ]
    x = (
        torch.stack([weights[f"{p}embeddings.cls_token"][0, 0], *patches])
        + weights[f"{p}embeddings.position_embedding"][0]
    )
    x = normed(weights, f"{p}embeddings.pre_layernorm", x, eps)
    head = fields["hidden_size"] // fields["num_attention_heads"]
    for i in range(fields["num_hidden_layers"]):
        layer = f"{p}encoder.layers.{i}"
        joint = project(
            weights,
            f"{layer}.self_attn.query_key_value",
            normed(weights, f"{layer}.input_layernorm", x, eps),
        )
        heads = []
        for h in range(fields["num_attention_heads"]):
            query, key, value = joint[:, 3 * h * head : 3 * (h + 1) * head].split(head, dim=1)
            heads.append(attend(query, key, value))
        x = x + project(weights, f"{layer}.self_attn.dense", torch.cat(heads, dim=1))
        inner = project(
            weights,
            f"{layer}.mlp.fc1",
            normed(weights, f"{layer}.post_attention_layernorm", x, eps),
        )
        x = x + project(weights, f"{layer}.mlp.fc2", inner / (1 + torch.exp(-1.702 * inner)))
    return normed(weights, f"{p}post_layernorm", x, eps)


def abstract(written: Written, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """(P, Dv) -> (Q + 1, D)."""
    owl1 = written.kind == "owl1"
    own = (
        written.config["visual_abstractor_config"]
        if owl1
        else written.config["visual_config"]["visual_abstractor"]
    )
    p = "abstractor." if owl1 else "model.visual_abstractor."
    x = weights["query_tokens" if owl1 else f"{p}query_embeds"][0]
    for i in range(own["num_hidden_layers"]):
        layer = f"{p}encoder.layers.{i}.crossattention"
        x = normed(weights, f"{layer}.norm1", x, 1e-5)
        both = torch.cat([x, normed(weights, f"{layer}.normk", features, 1e-5)])
        query_in, key_in = x, both
        if not owl1:
            q, k = (
                weights[f"{layer}.attention.q_pos_embed"],
                weights[f"{layer}.attention.k_pos_embed"],
            )
            query_in, key_in = x + q, both + torch.cat([q, k])
        inputs = {"query": query_in, "key": key_in, "value": both}
        parts = [
            project(weights, f"{layer}.attention.{name}", inside) for name, inside in inputs.items()
        ]
        heads = zip(*(part.chunk(own["num_attention_heads"], dim=1) for part in parts))
        x = x + project(
            weights, f"{layer}.output.out_proj", torch.cat([attend(*head) for head in heads], dim=1)
        )
        inside = normed(weights, f"{layer}.output.norm2", x, 1e-5)
        gate = project(weights, f"{layer}.output.mlp.w1", inside)
        inner = gate / (1 + torch.exp(-gate)) * project(weights, f"{layer}.output.mlp.w3", inside)
        inner = normed(
            weights, f"{layer}.output.mlp.ffn_ln", inner, own.get("layer_norm_eps", 1e-6)
        )
        x = x + project(weights, f"{layer}.output.mlp.w2", inner)
    return torch.cat([project(weights, f"{p}visual_fc", x), weights[f"{p}vit_eos"][0]])


def reference_lm(written: Written) -> ReferenceLM:
    """The loops over tokens and heads, with the checkpoint's weights."""
    text = written.config["text_config"] if written.kind == "owl1" else written.config
    renamed = {}
    for name, tensor in written.tensors.items():
        ours = (
            name.removeprefix("language_model.")
            .replace(".multiway.0.", ".text.")
            .replace(".multiway.1.", ".vision.")
        )
        ours = ours.replace(".v_kv_proj.", ".visual.kv_proj.").replace(
            "self_attn.gate_proj.", "self_attn.visual.gate_proj."
        )
        ours = (
            ours.replace("self_attn.gate", "self_attn.visual.gate")
            if ours.endswith("self_attn.gate")
            else ours
        )
        if ours.startswith(("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")):
            renamed[ours] = tensor.double()
    fusion = {"owl1": "concat", "owl2": "modality_adaptive"}.get(
        written.kind
    ) or written.kind.removeprefix("owl3_")
    shape = Shape(
        text["num_attention_heads"],
        text["hidden_size"] // text["num_attention_heads"],
        text["rope_theta"],
        text["rms_norm_eps"],
    )
    return ReferenceLM(
        renamed, shape, fusion, tuple(i - 1 for i in written.config.get("hyper_layers", ()))
    )


# Inputs


Row = list[int | str]


def inputs(
    written: Written, rows: list[Row], left: bool = False, unused: bool = True
) -> dict[str, Tensor]:
    """Rows of ids and IMAGE in the family's convention, padded.

    `unused`: images for mPLUG-Owl2's rows of text alone.
    """
    queries = written.config.get("num_query_tokens", 0)
    image = {"owl1": [-1] * (queries + 1), "owl2": [-200]}.get(
        written.kind, [written.config.get("image_token_id")]
    )
    flat = [[i for token in row for i in (image if token == IMAGE else [token])] for row in rows]
    length = max(map(len, flat))
    pads = [[0] * (length - len(row)) for row in flat]
    counts = [row.count(IMAGE) for row in rows]
    given = sum(max(c, int(unused and written.kind == "owl2")) for c in counts)
    ids = torch.tensor([p + row if left else row + p for row, p in zip(flat, pads)])
    mask = torch.tensor(
        [
            [0] * len(p) + [1] * len(row) if left else [1] * len(row) + [0] * len(p)
            for row, p in zip(flat, pads)
        ]
    )
    images = torch.randn(given, 3, written.image_size, written.image_size)
    labels = ids.where((mask.cumsum(1) > 1) & (mask == 1) & (ids >= 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "images": images, "labels": labels}


@dataclass
class Expected:
    """Of a row without its padding, images grown."""

    ids: list[int]
    is_image: list[bool]
    logits: Tensor
    """(T, V)"""


def expect(written: Written, rows: list[Row], io: dict[str, Tensor]) -> list[Expected]:
    """What comes out for `inputs`."""
    tokens = list(visual_tokens(written, io["images"])) if len(io["images"]) else []
    lm = reference_lm(written)
    spare = len(tokens) > sum(row.count(IMAGE) for row in rows)
    per_image = 1 if written.kind.startswith("owl3") or not tokens else len(tokens[0])
    out = []
    for row in rows:
        ids: list[int] = []
        is_image: list[bool] = []
        begun: list[int] = []
        for token in row:
            begun += [len(ids)] if token == IMAGE else []
            ids += (
                [written.config.get("image_token_id", 0)] * per_image if token == IMAGE else [token]
            )
            is_image += [token == IMAGE] * (len(ids) - len(is_image))
        shown = [tokens.pop(0) for _ in begun]
        if spare and not begun:
            tokens.pop(0)
        out.append(Expected(ids, is_image, lm.logits(ids, is_image, shown, begun)))
    return out


def expected_loss(expected: list[Expected]) -> Tensor:
    """The mean over all tokens of text that have one before them."""
    losses = [
        F.cross_entropy(row.logits[t - 1], torch.tensor(row.ids[t]))
        for row in expected
        for t in range(1, len(row.ids))
        if not row.is_image[t]
    ]
    return torch.stack(losses).mean()
