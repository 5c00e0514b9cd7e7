"""`owlfuse bench decode`: milliseconds per answered token against the number of images in the
prompt, for every fusion.

Random weights: the time does not depend on them. Every fusion has the same backbone, connector and
LLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.progress import track
from owlfuse.evaluation.generation import milliseconds_per_token
from owlfuse.model.multimodal import assemble
from owlfuse.planning.bench.report import machine, plot_lines, print_table

FUSIONS: dict[str, dict[str, Any]] = {
    "concat": {"_target_": "owlfuse.model.fusion.concat.Concat"},
    "modality_adaptive": {"_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"},
    "hyperattention": {
        "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
        "layers": [0, 2, 4, 6],
    },
}
VISION: dict[str, Any] = {
    "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
    "name": "vit_tiny_patch16_224",
    "image_size": 128,  # 64 patches, and 64 visual tokens of them
    "class_token": False,
    "kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2},
}
LLM = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
}
VOCABULARY, IMAGE_TOKEN, PROMPT = 1024, 5, 16


def model_with(fusion: dict[str, Any]) -> OwlfuseForConditionalGeneration:
    """The bench's model with this fusion, random weights."""
    llm = {"_target_": "owlfuse.model.llm.load_llm", "config": LLM}
    connector = {"_target_": "owlfuse.model.connectors.linear.LinearConnector"}
    torch.manual_seed(0)
    model = assemble(
        {"vision": VISION, "connector": connector, "fusion": fusion, "llm": llm}, VOCABULARY
    )
    return OwlfuseForConditionalGeneration.wrap(model.eval(), IMAGE_TOKEN)


def milliseconds(model: OwlfuseForConditionalGeneration, images: int, tokens: int) -> float:
    """Median time between two tokens of an answer about `images` pictures; the first token,
    which reads the prompt, apart."""
    device = model.device
    prompt = [IMAGE_TOKEN] * (images * model.config.tokens_per_image) + [7] * PROMPT
    pixels = torch.zeros(images, 3, VISION["image_size"], VISION["image_size"], device=device)
    return milliseconds_per_token(
        model, tokens, input_ids=torch.tensor([prompt], device=device), pixel_values=pixels
    )


def bench_decode(images: list[int], tokens: int, repeats: int, out: Path) -> dict[str, Any]:
    """Prints the table, and writes decode.json and decode.png into `out`. The repeats of all cells
    are interleaved, so that a slow minute of the machine does not fall on one fusion; each cell is
    the least of its repeats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: cast("Any", model_with(fusion)).to(device) for name, fusion in FUSIONS.items()}
    found: dict[str, dict[int, float]] = {name: {} for name in models}
    cells = [(count, name) for _ in range(repeats) for count in images for name in models]
    for model in models.values():
        milliseconds(model, 1, 2)
    for count, name in track(cells, "decoding", len(cells)):
        value = milliseconds(models[name], count, tokens)
        found[name][count] = min(value, found[name].get(count, value))
    growth = {name: times[images[-1]] / times[images[0]] for name, times in found.items()}
    rows = [
        [name, *(f"{times[n]:.2f}" for n in images), f"{growth[name]:.2f}"]
        for name, times in found.items()
    ]
    head = ["fusion", *map(str, images), f"{images[-1]} : {images[0]}"]
    print_table(f"milliseconds per token against images in the prompt ({machine()})", head, rows)
    result = {
        "machine": machine(),
        "tokens": tokens,
        "repeats": repeats,
        "milliseconds": found,
        "growth": growth,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.json").write_text(json.dumps(result, indent=2) + "\n")
    plot_lines(
        out / "decode.png",
        found,
        "images in the prompt",
        "ms per token",
        "decoding, 64 visual tokens an image",
    )
    print(f"decode.json and decode.png are in {out}")
    return result
