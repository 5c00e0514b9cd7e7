"""A multimodal LLM written out: one row, one token, one head at a time, in plain torch. Slow, and
independent of transformers and of owlfuse. Weights are taken by their names in the LLM, so
gradients reach them.

Q visual tokens per image, T positions of the row, D LLM width, H query heads, K key-value heads, d
head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Shape:
    """What the weights alone do not tell."""

    heads: int
    head_width: int
    theta: float = 10000.0
    eps: float = 1e-6
    windows: dict[int, int] | None = None
    """Layer -> how many tokens, itself included, a token sees there; all earlier ones in other
    layers."""


class ReferenceLM:
    """Logits of one row without padding.

    Args:
        fusion: `concat`, `modality_adaptive`, `deepstack`, `cross-before`, `cross-after`,
            `cross-parallel`, or a gate of hyperattention: `adaptive`, `static`, `fused`, `none`.
        layers: of hyperattention or cross-attention.
        mi_rope: of hyperattention: an image's keys are turned by the position of its placeholder,
            else not at all.
        bidirectional: of `concat`: an image's tokens see each other, whatever the window.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        shape: Shape,
        fusion: str,
        layers: tuple[int, ...] = (),
        mi_rope: bool = True,
        bidirectional: bool = False,
        sees: str = "all",
    ) -> None:
        self.weights = weights
        self.bidirectional = bidirectional
        self.sees = sees
        self.images: list[range] = []
        self.shape = shape
        self.fusion = fusion
        self.hyper_layers = layers
        self.mi_rope = mi_rope
        self.depth = 1 + max(
            int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")
        )

    def logits(
        self,
        ids: list[int],
        is_visual: list[bool],
        images: list[Tensor],
        starts: list[int],
        levels: list[Tensor] | None = None,
    ) -> Tensor:
        """(T, V). `images` are (Q, D), and `starts` the index of each one's first placeholder;
        `levels` are (L, Q, D) of each image."""
        hidden = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        spliced = self.fusion in ("concat", "modality_adaptive", "deepstack")
        self.images = [range(start, start + len(image)) for image, start in zip(images, starts)]
        if spliced:
            for image, start in zip(images, starts):
                for q in range(len(image)):
                    hidden[start + q] = image[q]
        for layer in range(self.depth):
            hidden = self.layer(layer, hidden, is_visual, [] if spliced else images, starts)
            for image_levels, start in zip(levels or [], starts):
                if layer < len(image_levels):
                    for q in range(len(image_levels[layer])):
                        hidden[start + q] = hidden[start + q] + image_levels[layer][q]
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return torch.stack([head @ self.norm(x, self.weights["model.norm.weight"]) for x in hidden])

    def layer(
        self,
        layer: int,
        hidden: list[Tensor],
        visual: list[bool],
        images: list[Tensor],
        starts: list[int],
    ):
        """One decoder layer over the row."""
        path = f"model.layers.{layer}"
        crosses = self.fusion.startswith("cross-") and layer in self.hyper_layers

        def cross(place, t, x):
            if not crosses or self.fusion != f"cross-{place}":
                return 0
            return self.cross(path, t, x, images, starts)

        hidden = [x + cross("before", t, x) for t, x in enumerate(hidden)]
        normed = [
            self.norm_by_name(f"{path}.input_layernorm", x, v) for x, v in zip(hidden, visual)
        ]
        query, key, value = [], [], []
        for t, (x, v) in enumerate(zip(normed, visual)):
            attention = f"{path}.self_attn"
            query.append(
                self.rotated_heads(
                    self.project_by(f"{attention}.q_proj", x, v), t, f"{attention}.q_norm"
                )
            )
            key.append(
                self.rotated_heads(
                    self.project_by(f"{attention}.k_proj", x, v), t, f"{attention}.k_norm"
                )
            )
            value.append(self.split(self.project_by(f"{attention}.v_proj", x, v)))
        hyper = layer in self.hyper_layers and bool(images) and not crosses
        image_key, image_value = self.image_keys_values(path, images, starts) if hyper else ([], [])
        out = []
        for t in range(len(hidden)):
            attended = self.attend(layer, t, query[t], key, value, image_key, image_value, starts)
            x = hidden[t] + self.project_by(f"{path}.self_attn.o_proj", attended, visual[t])
            x = x + cross("parallel", t, hidden[t])
            x = x + cross("after", t, x)
            mlp_in = self.norm_by_name(f"{path}.post_attention_layernorm", x, visual[t])
            mlp = f"{path}.mlp"
            if f"{mlp}.text.up_proj.weight" in self.weights:
                mlp += ".vision" if visual[t] else ".text"
            gate = self.project(f"{mlp}.gate_proj", mlp_in)
            up = self.project(f"{mlp}.up_proj", mlp_in)
            out.append(x + self.project(f"{mlp}.down_proj", gate / (1 + torch.exp(-gate)) * up))
        return out

    def cross(self, path: str, t: int, x: Tensor, images: list[Tensor], starts: list[int]):
        """What the cross-attention of a layer adds to the hidden state x of token t."""
        block = f"{path}.visual"
        seen = [i for i, start in enumerate(starts) if start <= t]
        if self.sees == "last" and seen:
            # backwards from the last one, as long as they stand side by side
            last = [seen.pop()]
            while seen and starts[seen[-1]] == starts[last[-1]] - 1:
                last.append(seen.pop())
            seen = last[::-1]
        patches = [p for i in seen for p in images[i]]
        if not patches:
            return 0
        query = self.normed_heads(block, "q", self.norm_by_name(f"{block}.norm", x, False))
        keys = [self.normed_heads(block, "k", patch) for patch in patches]
        values = [self.split(self.project(f"{block}.v_proj", patch)) for patch in patches]
        heads = []
        for h in range(self.shape.heads):
            k = h * len(keys[0]) // self.shape.heads
            pairs = [(key[k], value[k]) for key, value in zip(keys, values)]
            heads.append(self.softmax_sum(query[h], pairs))
        update = self.gated(f"{block}.gate", self.project(f"{block}.o_proj", torch.cat(heads)))
        if f"{block}.up_proj.weight" in self.weights:
            mlp_in = self.norm_by_name(f"{block}.mlp_norm", x + update, False)
            gate = self.project(f"{block}.gate_proj", mlp_in)
            up = self.project(f"{block}.up_proj", mlp_in)
            mlp = self.project(f"{block}.down_proj", gate / (1 + torch.exp(-gate)) * up)
            update = update + self.gated(f"{block}.mlp_gate", mlp)
        return update

    def normed_heads(self, block: str, kind: str, x: Tensor) -> list[Tensor]:
        heads = self.split(self.project(f"{block}.{kind}_proj", x))
        norm = f"{block}.{kind}_norm.weight"
        return [
            self.norm(head, self.weights[norm]) if norm in self.weights else head for head in heads
        ]

    def gated(self, name: str, x: Tensor) -> Tensor:
        return x * torch.tanh(self.weights[name]) if name in self.weights else x

    def attend(self, layer, t, query, key, value, image_key, image_value, starts) -> Tensor:
        """What token t gathers, its heads side by side, before the output projection."""
        window = (self.shape.windows or {}).get(layer, t + 1)
        seen = set(range(max(0, t + 1 - window), t + 1))
        if self.bidirectional:
            seen.update(*(image for image in self.images if t in image))
        seen = sorted(seen)
        images = [i for i in range(len(image_key)) if starts[i] <= t]
        text, cross, joint = [], [], []
        for h in range(self.shape.heads):
            k = h * len(key[0]) // self.shape.heads  # the key-value head of this query head
            own = [(key[s][k], value[s][k]) for s in seen]
            other = [
                (image_key[i][p][k], image_value[i][p][k])
                for i in images
                for p in range(len(image_key[i]))
            ]
            text.append(self.softmax_sum(query[h], own))
            if other:
                cross.append(self.softmax_sum(query[h], other))
                joint.append(self.softmax_sum(query[h], other + own))
        text = torch.cat(text)
        if not images:
            return text
        if self.fusion == "fused":
            return torch.cat(joint)
        visual = f"model.layers.{layer}.self_attn.visual"
        if self.fusion == "none":
            return torch.cat(cross) + text
        gate = (
            self.weights[f"{visual}.gate"]
            if self.fusion == "static"
            else self.project(f"{visual}.gate_proj", text)
        )
        gate = 1 / (1 + torch.exp(-gate))
        return torch.cat(cross) * gate + text * (1 - gate)

    def softmax_sum(self, query: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(d): the values weighted by the softmax of query . key / sqrt(d)."""
        scores = torch.stack([(query * key).sum() for key, _ in pairs]) / math.sqrt(
            self.shape.head_width
        )
        weights = torch.exp(scores - scores.max().detach())
        return sum(w * value for w, (_, value) in zip(weights / weights.sum(), pairs))

    def image_keys_values(self, path: str, images: list[Tensor], starts: list[int]):
        """Keys, rotated to the image's placeholder, and values: [image][patch][head] -> (d)."""
        keys, values = [], []
        d = self.shape.head_width
        for image, start in zip(images, starts):
            keys.append([])
            values.append([])
            for patch in image:
                own, shared = (
                    f"{path}.self_attn.visual.norm.weight",
                    f"{path}.input_layernorm.weight",
                )
                normed = self.norm(patch, self.weights[own if own in self.weights else shared])
                joint = self.project(f"{path}.self_attn.visual.kv_proj", normed)
                heads = [joint[2 * d * k : 2 * d * (k + 1)] for k in range(len(joint) // (2 * d))]
                turn = start if self.mi_rope else 0
                keys[-1].append(
                    self.rotated_heads(
                        torch.cat([x[:d] for x in heads]), turn, f"{path}.self_attn.k_norm"
                    )
                )
                values[-1].append([x[d:] for x in heads])
        return keys, values

    def rotated_heads(self, joined: Tensor, position: int, norm: str) -> list[Tensor]:
        """The heads of a query or key, normed where the LLM does (Qwen3), and turned by their
        position."""
        heads = self.split(joined)
        if f"{norm}.weight" in self.weights:
            heads = [self.norm(x, self.weights[f"{norm}.weight"]) for x in heads]
        return [self.rotate(x, position) for x in heads]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Pairs (j, j + d/2) turned by position / theta^(2j/d)."""
        half = len(x) // 2
        angles = [position / self.shape.theta ** (2 * j / len(x)) for j in range(half)]
        first = [x[j] * math.cos(a) - x[j + half] * math.sin(a) for j, a in enumerate(angles)]
        second = [x[j + half] * math.cos(a) + x[j] * math.sin(a) for j, a in enumerate(angles)]
        return torch.stack(first + second)

    def split(self, joined: Tensor) -> list[Tensor]:
        d = self.shape.head_width
        return [joined[d * k : d * (k + 1)] for k in range(len(joined) // d)]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm."""
        return x / torch.sqrt((x * x).mean() + self.shape.eps) * weight

    def norm_by_name(self, name: str, x: Tensor, visual: bool) -> Tensor:
        return self.norm(x, self.weights[f"{name}{self.copy(name, visual)}.weight"])

    def project(self, name: str, x: Tensor) -> Tensor:
        out = self.weights[f"{name}.weight"] @ x
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out

    def project_by(self, name: str, x: Tensor, visual: bool) -> Tensor:
        return self.project(f"{name}{self.copy(name, visual)}", x)

    def copy(self, name: str, visual: bool) -> str:
        """Which copy of a module a token passes, by its modality; none where it has no copies."""
        if f"{name}.text.weight" not in self.weights:
            return ""
        return ".vision" if visual else ".text"
