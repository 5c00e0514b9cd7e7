"""Benchmark `step`: real tokens per second of a training step on a batch of mixed lengths and
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

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.measure import (
    autocast,
    device_name,
    full_adapters,
    fusion_configs,
    llama_config,
    ratio_text,
    ratios,
    time_interleaved,
    upper_median,
    write_report,
)
from owlfuse.core.types import Batch, Encoded
from owlfuse.data.collate import Collator
from owlfuse.model.loss import batch_loss, token_loss
from owlfuse.model.multimodal import MultimodalLM, build_model
from owlfuse.parallel.collectives import clip, divide, total_norm

IMAGE_TOKEN = 5
PEER = "LLaVA of transformers"
STAGES = ("forward", "backward", "clipping", "optimizer")
PADDED = (PEER, "owlfuse, without packing", "owlfuse, neither")
"""Those whose rows are padded to the longest."""
CONCAT, ADAPTIVE = "concat", "modality_adaptive"
EVERYWHERE = "modality_adaptive, both copies everywhere"
Loss = Callable[[], tuple[Tensor, Tensor | float]]
"""Returns the sum over tokens and their count."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of both models."""

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
        """Visual tokens per image, Q."""
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
    """Return the configuration of both models' Llama."""
    return llama_config(
        sizes.width,
        sizes.hidden,
        sizes.layers,
        sizes.heads,
        sizes.key_value_heads,
        vocab_size=sizes.vocabulary,
        pad_token_id=None,
    )


def owlfuse_model(sizes: Sizes, fusion: str = CONCAT) -> MultimodalLM:
    """Return our model with random weights, everything trained; by default the fusion is the
    peer's own, concatenation."""
    vision = {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": "vit_base_patch16_clip_224",
        "image_size": sizes.image_size,
        "class_token": False,
        "kwargs": {
            "embed_dim": sizes.vision_width,
            "depth": sizes.vision_layers,
            "num_heads": sizes.vision_heads,
            "patch_size": sizes.patch,
        },
    }
    part_configs = {
        "vision": vision,
        "connector": {"_target_": "owlfuse.model.connectors.mlp.MLPConnector"},
        "fusion": fusion_configs([])[fusion],
        "llm": {"_target_": "owlfuse.model.llm.load_llm", "config": llm_config(sizes)},
        "adapter": full_adapters(),
    }
    # Made on the device, without a copy on the CPU.
    torch.manual_seed(0)
    with torch.device(device_name()):
        model, _ = build_model(part_configs, sizes.vocabulary)
    return model.to(device_name()).train()


def peer_model(sizes: Sizes) -> LlavaForConditionalGeneration:
    """Return the peer with random weights: CLIP's vision transformer, whose last layer is read, an
    MLP and the same Llama."""
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
        vision_feature_layer=-1,  # as ours: LLaVA's default is the last but one
    )
    torch.manual_seed(0)
    with torch.device(device_name()):
        model: Any = LlavaForConditionalGeneration(config)
    return model.to(device_name()).train()


def make_samples(data: Data, sizes: Sizes, tokens_per_image: int) -> list[Encoded]:
    """Return the step's samples: the image's placeholders, the question, and the answer, which is
    supervised."""
    rng = random.Random(data.seed)
    generator = torch.Generator().manual_seed(data.seed)
    samples = []
    for number in range(data.rows):
        # Evenly on a logarithmic scale: most chats are short.
        length = round(math.exp(rng.uniform(math.log(data.shortest), math.log(data.longest))))
        answer_length = round(length * rng.uniform(*data.supervised))
        has_image = number % 2 == 1  # every second one, whatever the seed
        text = torch.randint(IMAGE_TOKEN + 1, sizes.vocabulary, (length,), generator=generator)
        placeholders = torch.full((tokens_per_image if has_image else 0,), IMAGE_TOKEN)
        ids = torch.cat([placeholders, text])
        labels = ids.clone()
        labels[: len(ids) - answer_length] = -100
        pixels = []
        if has_image:
            shape = 3, sizes.image_size, sizes.image_size
            pixels.append(torch.randn(shape, generator=generator))
        offsets = [0] if has_image else []
        sample = Encoded(str(number), "", ids, labels, ids == IMAGE_TOKEN, pixels, offsets)
        samples.append(sample)
    return samples


def make_batch(samples: list[Encoded], sizes: Sizes, pack_to: int | None) -> Batch:
    """Return the samples as ours and the peer read them, packed or each in a row of its own."""
    shape = 3, sizes.image_size, sizes.image_size
    return Collator(0, shape, pack_to=pack_to)(samples).to(device_name())


def make_step(model: nn.Module, precision: str) -> Callable[[Loss], Tensor]:
    """Return a training step of a loss: forward, backward, clipping and AdamW.

    It returns the mean loss of its tokens.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(loss: Loss) -> Tensor:
        with record_function("forward"), autocast(precision):
            value, tokens = loss()
        with record_function("backward"):
            value.backward()
        with record_function("clipping"):
            gradients = [p.grad for p in parameters if p.grad is not None]
            # As owlfuse trains: the sum's gradients are divided by the tokens.
            divide(gradients, torch.as_tensor(tokens))
            clip(gradients, total_norm(gradients), 1.0)
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        return value.detach() / tokens

    return step


def make_steps(
    sizes: Sizes, padded: Batch, packed: Batch, precision: str
) -> dict[str, Callable[[], Tensor]]:
    """Return the peer's step and ours by name."""
    # Both stay in memory, since their steps alternate.
    peer: Any = peer_model(sizes)
    model = owlfuse_model(sizes)
    peer_step = make_step(peer, precision)
    owlfuse_step = make_step(model, precision)

    def peer_loss() -> tuple[Tensor, float]:
        output = peer(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            labels=padded.labels,
            pixel_values=padded.pixel_values,
            use_cache=False,
        )
        return output.loss, 1.0  # a mean already

    def everywhere(batch: Batch) -> tuple[Tensor, Tensor]:
        return token_loss(model(batch), batch.labels)

    losses: dict[str, Loss] = {
        "owlfuse": lambda: batch_loss(model, packed),
        "owlfuse, without packing": lambda: batch_loss(model, padded),
        "owlfuse, logits everywhere": lambda: everywhere(packed),
        "owlfuse, neither": lambda: everywhere(padded),
    }
    steps: dict[str, Callable[[], Tensor]] = {PEER: partial(peer_step, peer_loss)}
    steps |= {name: partial(owlfuse_step, loss) for name, loss in losses.items()}
    return steps


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
    samples = make_samples(data, sizes, sizes.visual_tokens)
    # The same samples: only their arrangement in rows differs.
    padded = make_batch(samples, sizes, None)
    packed = make_batch(samples, sizes, pack_to)
    tokens = sum(padded.lengths)
    supervised = int((padded.targets() != -100).sum())
    seconds = time_interleaved(make_steps(sizes, padded, packed, precision), repeats)
    speedups = {name: ratios(seconds[PEER], turns) for name, turns in seconds.items()}
    records = []
    for name, turns in seconds.items():
        batch = padded if name in PADDED else packed
        # Real tokens: padding is no work that anybody asked for.
        median = upper_median(turns)
        records.append(
            {
                "": name,
                "ms a step": f"{1000 * median:.0f}",
                "real tokens a second": f"{tokens / median:,.0f}",
                "padding": f"{1 - tokens / batch.input_ids.numel():.0%}",
                "times as fast as the peer": ratio_text(speedups[name]),
            }
        )
    title = (
        f"a training step of {data.rows} samples, {tokens} tokens with {supervised} supervised, "
        f"{len(padded.pixel_values)} images, {precision}: medians of {repeats} turns, and of the "
        "turns' ratios with their middle half"
    )
    result = {
        "sizes": vars(sizes),
        "data": vars(data),
        "pack_to": pack_to,
        "precision": precision,
        "tokens": tokens,
        "supervised": supervised,
        "positions": {"padded": padded.input_ids.numel(), "packed": packed.input_ids.numel()},
        "seconds": seconds,
        "times_as_fast": speedups,
    }
    write_report(out, "step", result, {title: pd.DataFrame(records)})
    return result


def adaptive_steps(sizes: Sizes, batch: Batch, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Return the steps of concatenation and of modality-adaptive layers by name."""
    models = {name: owlfuse_model(sizes, name) for name in (CONCAT, ADAPTIVE)}
    steps = {name: make_step(model, precision) for name, model in models.items()}

    def run(name: str, batch: Batch) -> Tensor:
        return steps[name](lambda: batch_loss(models[name], batch))

    # Without their count visual positions are not known to be few: both copies run everywhere.
    uncounted = replace(batch, visual_count=None)
    return {
        CONCAT: partial(run, CONCAT, batch),
        ADAPTIVE: partial(run, ADAPTIVE, batch),
        EVERYWHERE: partial(run, ADAPTIVE, uncounted),
    }


def bench_modality_adaptive(
    out: Path,
    repeats: int = 9,
    pack_to: int = 320,
    precision: str = "32-true",
    size: str = "small",
) -> dict[str, Any]:
    """Prints the table, and writes modality_adaptive.md and modality_adaptive.json into `out`.

    Args:
        pack_to: the most tokens of a row.
        precision: 32-true or bf16-mixed.
        size: of `SIZES`.
    """
    sizes, data = SIZES[size]
    samples = make_samples(data, sizes, sizes.visual_tokens)
    batch = make_batch(samples, sizes, pack_to)
    records = []
    steps: dict[str, dict[str, Any]] = {}
    for group_size in (1, 4):  # query heads of a key-value head
        grouped = replace(sizes, key_value_heads=sizes.heads // group_size)
        seconds = time_interleaved(adaptive_steps(grouped, batch, precision), repeats)
        over_concat = {name: ratios(turns, seconds[CONCAT]) for name, turns in seconds.items()}
        heads = f"{grouped.heads} query heads, {grouped.key_value_heads} key-value heads"
        steps[heads] = {"seconds": seconds, "over_concat": over_concat}
        for name, ratio in over_concat.items():
            overhead = {key: 100 * (value - 1) for key, value in ratio.items()}
            records.append(
                {
                    "": f"{heads}: {name}",
                    "ms a step": f"{1000 * upper_median(seconds[name]):.0f}",
                    "over concat, %": ratio_text(overhead, 1),
                }
            )
    tokens = sum(batch.lengths)
    visual = (batch.visual_count or 0) / tokens
    title = (
        f"a training step of {data.rows} samples, {tokens} tokens, {visual:.0%} of them visual, "
        f"{precision}: medians of {repeats} turns, and of the turns' ratios with their middle half"
    )
    result = {
        "sizes": vars(sizes),
        "data": vars(data),
        "precision": precision,
        "visual_share": visual,
        "steps": steps,
    }
    write_report(out, "modality_adaptive", result, {title: pd.DataFrame(records)})
    return result
