"""`owlfuse bench step`: real tokens per second of a training step on a batch of mixed lengths and
modalities, against transformers' `LlavaForConditionalGeneration` with the same sizes, data,
precision and optimizer.

The peer pads its rows to the longest and computes logits everywhere, as its `labels` have it do.
Ours is measured as it is, and without what makes the difference, one thing at a time. B rows, T
text positions, Q visual tokens per image.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from owlfuse.core.types import Batch, Encoded
from owlfuse.data.collate import Collator
from owlfuse.model.loss import batch_loss, token_loss
from owlfuse.model.multimodal import MultimodalLM, build_model
from owlfuse.parallel.collectives import clip, divide
from owlfuse.planning.bench.pairs import device_name, in_turns, lowered, ratios, shown
from owlfuse.planning.bench.report import leave

IMAGE_TOKEN = 5
PEER = "LLaVA of transformers"
STAGES = ("forward", "backward", "clipping", "optimizer")


@dataclass(frozen=True)
class Sizes:
    """Of both models."""

    width: int = 512
    hidden: int = 1376
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 8
    vocabulary: int = 32000
    vision_width: int = 192
    vision_layers: int = 4
    vision_heads: int = 3
    image_size: int = 128
    patch: int = 16

    @property
    def visual_tokens(self) -> int:
        """Q."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class Data:
    """The samples of a step: half of them with an image, of as many text tokens as is drawn between
    two numbers, evenly on a logarithmic scale (most chats are short), of which the share that is
    drawn, the answer, is supervised."""

    rows: int = 16
    shortest: int = 24
    longest: int = 256
    supervised: tuple[float, float] = (0.1, 0.8)
    seed: int = 0


SIZES = {
    "small": (Sizes(), Data()),
    "0.4b": (Sizes(1024, 2816, 24, 16, 16, 32000, 768, 12, 12, 224), Data(longest=1024)),
    "quick": (Sizes(64, 128, 2, 4, 4, 512, 32, 1, 2), Data(rows=6, longest=64)),
}
"""`small` for two CPU cores; `0.4b` for a GPU: the LLM has 0.37 billion parameters, the backbone
is a ViT-B/16."""


def llm_config(sizes: Sizes) -> dict[str, Any]:
    """The Llama of both."""
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 16384,
        "pad_token_id": None,
    }


def our_model(sizes: Sizes, fusion: dict[str, Any] | None = None, **options: Any) -> MultimodalLM:
    """Ours with random weights, everything trained; by default the fusion is the peer's own,
    concatenation."""
    vision: dict[str, Any] = {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": "vit_base_patch16_clip_224",
        "image_size": sizes.image_size,
        "class_token": False,
        "kwargs": {
            "embed_dim": sizes.vision_width,
            "depth": sizes.vision_layers,
            "num_heads": sizes.vision_heads,
        },
    }
    vision["kwargs"]["patch_size"] = sizes.patch
    nodes = {
        "vision": vision,
        "connector": {"_target_": "owlfuse.model.connectors.mlp.MLPConnector"},
        "fusion": fusion or {"_target_": "owlfuse.model.fusion.concat.Concat"},
        "llm": {
            "_target_": "owlfuse.model.llm.load_llm",
            "config": {"model_type": "llama", **llm_config(sizes)},
        },
        "adapter": {
            part: {"_target_": "owlfuse.model.adapters.Full"}
            for part in ("vision", "connector", "fusion", "llm")
        },
        **options,
    }
    torch.manual_seed(0)
    with torch.device(device_name()):
        return build_model(nodes, sizes.vocabulary)[0].to(device_name()).train()


def their_model(sizes: Sizes) -> LlavaForConditionalGeneration:
    """The peer with random weights:

    CLIP's vision transformer, whose last layer is read, an MLP and the same Llama.
    """
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**llm_config(sizes)),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=sizes.visual_tokens,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    with torch.device(device_name()):
        model: Any = LlavaForConditionalGeneration(config)
    return model.to(device_name()).train()


def samples_of(data: Data, sizes: Sizes, per_image: int) -> list[Encoded]:
    """The step's samples: the image's placeholders, the question, and the answer, which is
    supervised."""
    rng, generator = random.Random(data.seed), torch.Generator().manual_seed(data.seed)
    found = []
    for number in range(data.rows):
        text = round(math.exp(rng.uniform(math.log(data.shortest), math.log(data.longest))))
        share = rng.uniform(*data.supervised)
        taken = per_image if number % 2 else 0
        words = torch.randint(IMAGE_TOKEN + 1, sizes.vocabulary, (text,), generator=generator)
        ids = torch.cat([torch.full((taken,), IMAGE_TOKEN), words])
        labels = torch.where(torch.arange(len(ids)) < len(ids) - round(text * share), -100, ids)
        pixels = (
            [torch.randn(3, sizes.image_size, sizes.image_size, generator=generator)]
            if taken
            else []
        )
        found.append(
            Encoded(str(number), "", ids, labels, ids == IMAGE_TOKEN, pixels, [0] if taken else [])
        )
    return found


def batch_of(samples: list[Encoded], sizes: Sizes, pack_to: int | None) -> Batch:
    """The samples as ours and the peer read them, packed or each in a row of its own."""
    return Collator(0, (3, sizes.image_size, sizes.image_size), pack_to=pack_to)(samples).to(
        device_name()
    )


Loss = Callable[[], tuple[Tensor, Tensor | float]]


def step_of(model: nn.Module, precision: str) -> Callable[[Loss], Tensor]:
    """A training step of a loss: forward, backward, clipping and AdamW.

    It gives the mean loss of its tokens.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(loss: Loss) -> Tensor:
        with record_function(STAGES[0]), lowered(precision):
            value, tokens = loss()
        with record_function(STAGES[1]):
            value.backward()
        with record_function(STAGES[2]):
            gradients = [p.grad for p in parameters if p.grad is not None]
            divide(gradients, torch.as_tensor(tokens))
            clip(gradients, 1.0)
        with record_function(STAGES[3]):
            optimizer.step()
            optimizer.zero_grad()
        return value.detach() / tokens

    return step


def steps_of(
    sizes: Sizes, data: Data, pack_to: int, precision: str
) -> tuple[dict[str, Callable[[], Tensor]], Batch, Batch]:
    """The peer's step and ours by name, and the padded and the packed batch."""
    samples = samples_of(data, sizes, sizes.visual_tokens)
    padded, packed = batch_of(samples, sizes, None), batch_of(samples, sizes, pack_to)
    theirs = their_model(sizes)
    peers = {
        name: getattr(padded, name)
        for name in ("input_ids", "attention_mask", "labels", "pixel_values")
    }

    model = our_model(sizes)

    def everywhere(batch: Batch) -> tuple[Tensor, Tensor]:
        return token_loss(model(batch), batch.labels)

    their_step, our_step = step_of(theirs, precision), step_of(model, precision)
    steps = {
        PEER: lambda: their_step(lambda: (theirs(**peers, use_cache=False).loss, 1.0)),
        "owlfuse": lambda: our_step(lambda: batch_loss(model, packed)),
        "owlfuse, without packing": lambda: our_step(lambda: batch_loss(model, padded)),
        "owlfuse, logits everywhere": lambda: our_step(lambda: everywhere(packed)),
        "owlfuse, neither": lambda: our_step(lambda: everywhere(padded)),
    }
    return steps, padded, packed


def bench_step(
    out: Path,
    repeats: int = 7,
    pack_to: int = 320,
    precision: str = "32-true",
    size: str = "small",
) -> dict[str, Any]:
    """Prints the table, and writes step.md and step.json into `out`.

    Args:
        pack_to: the most tokens of a row of ours.
        precision: 32-true or bf16-mixed.
        size: of `SIZES`.
    """
    sizes, data = SIZES[size]
    steps, padded, packed = steps_of(sizes, data, pack_to, precision)
    tokens, supervised = sum(padded.lengths), int((padded.targets() != -100).sum())
    seconds = in_turns(steps, repeats)
    against = {name: ratios(seconds[PEER], own) for name, own in seconds.items()}
    rows = []
    for name, own in seconds.items():
        batch = padded if name in (PEER, "owlfuse, without packing", "owlfuse, neither") else packed
        median = sorted(own)[len(own) // 2]
        share = 1 - tokens / batch.input_ids.numel()
        rows.append(
            [
                name,
                f"{1000 * median:.0f}",
                f"{tokens / median:,.0f}",
                f"{share:.0%}",
                shown(against[name]),
            ]
        )
    title = (
        f"a training step of {data.rows} samples, {tokens} tokens with {supervised} supervised, "
        f"{len(padded.pixel_values)} "
        f"images, {precision}: medians of {repeats} turns, and of the turns' ratios with their "
        "middle half"
    )
    head = ["", "ms a step", "real tokens a second", "padding", "times as fast as the peer"]
    result = {
        "sizes": vars(sizes),
        "data": vars(data),
        "pack_to": pack_to,
        "precision": precision,
        "tokens": tokens,
        "supervised": supervised,
        "positions": {"padded": padded.input_ids.numel(), "packed": packed.input_ids.numel()},
        "seconds": seconds,
        "times_as_fast": against,
    }
    leave(out, "step", result, [(title, head, rows)])
    return result


FUSIONS = {
    "concat": {"_target_": "owlfuse.model.fusion.concat.Concat"},
    "modality_adaptive": {"_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"},
}
EVERYWHERE = "modality_adaptive, both copies everywhere"


def runs_of(own: Sizes, batch: Batch, precision: str) -> dict[str, Callable[[], Tensor]]:
    """The steps by name."""
    models = {name: our_model(own, fusion) for name, fusion in FUSIONS.items()}
    steps = {name: step_of(model, precision) for name, model in models.items()}
    of = {
        **{name: (name, batch) for name in FUSIONS},
        EVERYWHERE: ("modality_adaptive", replace(batch, visual_count=None)),
    }

    def run(name: str, batch: Batch) -> Tensor:
        return steps[name](lambda: batch_loss(models[name], batch))

    return {name: partial(run, *what) for name, what in of.items()}


def bench_modality_adaptive(
    out: Path, repeats: int = 9, pack_to: int = 320, precision: str = "32-true", size: str = "small"
) -> dict[str, Any]:
    """Prints the table, and writes modality_adaptive.md and modality_adaptive.json into `out`.

    Args:
        pack_to: the most tokens of a row.
        precision: 32-true or bf16-mixed.
        size: of `SIZES`.
    """
    sizes, data = SIZES[size]
    rows: list[list[str]] = []
    found: dict[str, dict[str, Any]] = {}
    for groups in (1, 4):
        own = replace(sizes, key_value_heads=sizes.heads // groups)
        samples = samples_of(data, own, own.visual_tokens)
        batch = batch_of(samples, own, pack_to)
        seconds = in_turns(runs_of(own, batch, precision), repeats)
        name = f"{own.heads} query heads, {own.key_value_heads} key-value heads"
        found[name] = {
            "seconds": seconds,
            "over_concat": {k: ratios(v, seconds["concat"]) for k, v in seconds.items()},
        }
        for run, ratio in found[name]["over_concat"].items():
            median = 1000 * sorted(seconds[run])[len(seconds[run]) // 2]
            overhead = {key: 100 * (value - 1) for key, value in ratio.items()}
            rows.append([f"{name}: {run}", f"{median:.0f}", shown(overhead, 1)])
    visual = (batch.visual_count or 0) / sum(batch.lengths)
    title = (
        f"a training step of {data.rows} samples, {sum(batch.lengths)} tokens, {visual:.0%} of "
        f"them visual, {precision}: "
        f"medians of {repeats} turns, and of the turns' ratios with their middle half"
    )
    result = {
        "sizes": vars(sizes),
        "data": vars(data),
        "precision": precision,
        "visual_share": visual,
        "steps": found,
    }
    leave(out, "modality_adaptive", result, [(title, ["", "ms a step", "over concat, %"], rows)])
    return result
