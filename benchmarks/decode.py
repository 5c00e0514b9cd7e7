"""Benchmark `decode`: milliseconds per answered token against the number of images in the
prompt, for every fusion.

Random weights: the time does not depend on them. Every fusion has the same backbone, connector and
LLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from benchmarks.measure import device_name, fusion_configs, llama_config, plot_lines, write_report
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.progress import track
from owlfuse.evaluation.generation import milliseconds_per_token
from owlfuse.model.multimodal import assemble

FUSIONS = fusion_configs([0, 2, 4, 6])
VISION: dict[str, Any] = {
    "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
    "name": "vit_tiny_patch16_224",
    "image_size": 128,  # 64 patches, and 64 visual tokens of them
    "class_token": False,
    "kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2},
}
LLM = llama_config(256, 512, layers=8, heads=8, key_value_heads=4)
VOCABULARY, IMAGE_TOKEN = 1024, 5
TEXT_TOKENS = 16
"""Of the prompt, beside its images."""


def make_model(fusion: dict[str, Any]) -> OwlfuseForConditionalGeneration:
    """Return the bench's model with this fusion, random weights."""
    part_configs = {
        "vision": VISION,
        "connector": {"_target_": "owlfuse.model.connectors.linear.LinearConnector"},
        "fusion": fusion,
        "llm": {"_target_": "owlfuse.model.llm.load_llm", "config": LLM},
    }
    torch.manual_seed(0)
    model = assemble(part_configs, VOCABULARY)
    return OwlfuseForConditionalGeneration.wrap(model.eval(), IMAGE_TOKEN)


def milliseconds(model: OwlfuseForConditionalGeneration, images: int, tokens: int) -> float:
    """Return the median time between two tokens of an answer about `images` pictures; the first
    token, which reads the prompt, apart."""
    # Contents do not matter: random weights say nothing of them.
    placeholders = [IMAGE_TOKEN] * (images * model.config.tokens_per_image)
    ids = torch.tensor([placeholders + [7] * TEXT_TOKENS], device=model.device)
    size = VISION["image_size"]
    pixels = torch.zeros(images, 3, size, size, device=model.device)
    return milliseconds_per_token(model, tokens, input_ids=ids, pixel_values=pixels)


def bench_decode(images: list[int], tokens: int, repeats: int, out: Path) -> dict[str, Any]:
    """Prints the table, and writes decode.md, decode.json and decode.png into `out`.

    The repeats of all cells are interleaved, so that a slow minute of the machine does not fall on
    one fusion; each cell is the least of its repeats.
    """
    models = {}
    for name, fusion in FUSIONS.items():
        models[name] = cast("Any", make_model(fusion)).to(device_name())
        milliseconds(models[name], 1, 2)  # kernels are chosen and memory is taken by the first
    cells = [(count, name) for count in images for name in models] * repeats
    times: dict[str, dict[int, float]] = {name: {} for name in models}
    for count, name in track(cells, "decoding", len(cells)):
        value = milliseconds(models[name], count, tokens)
        # The least: what else the machine does makes a step slower, never faster.
        times[name][count] = min(value, times[name].get(count, value))

    first, last = images[0], images[-1]
    growth = {name: points[last] / points[first] for name, points in times.items()}
    records = []
    for name, points in times.items():
        record = {"fusion": name}
        record |= {str(count): f"{points[count]:.2f}" for count in images}
        record[f"{last} : {first}"] = f"{growth[name]:.2f}"
        records.append(record)
    result = {
        "tokens": tokens,
        "repeats": repeats,
        "milliseconds": times,
        "growth": growth,
    }
    table = {"milliseconds per token against images in the prompt": pd.DataFrame(records)}
    result = write_report(out, "decode", result, table)
    title = "decoding, 64 visual tokens an image"
    plot_lines(out / "decode.png", times, "images in the prompt", "ms per token", title)
    print(f"decode.png is in {out}")
    return result
