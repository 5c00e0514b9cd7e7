"""A run, or any model, as a folder that transformers, peft and owlfuse read; and reading one.

OUT/ holds config.json, model.safetensors (in shards over a size), generation_config.json, the
tokenizer with its chat template, processor_config.json, README.md (the model card) and, of a run
with LoRA, adapter/ in peft's format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from owlfuse.artifacts.load import ADAPTER, RELEASED, Trained, processor_of, wrap
from owlfuse.artifacts.lora import merge_lora, save_lora, without_lora
from owlfuse.artifacts.released.saving import write_record
from owlfuse.core.files import atomic_directory
from owlfuse.model.multimodal import MultimodalLM


def export(
    trained: Trained, out: Path, merge: bool = False, max_shard_size: str = "5GB", source: str = ""
) -> Path:
    """Writes OUT, whole or not at all.

    Args:
        merge: fold LoRA's updates into the weights; else they are written apart, in `adapter/`.
        source: what the model card says it comes from.

    Raises:
        FileExistsError: OUT holds something.
    """
    model = trained.model
    wrapped = wrap(trained)
    if merge:
        merge_lora(model)
    with atomic_directory(out) as folder:
        wrapped.save_pretrained(
            folder, state_dict=without_lora(wrapped), max_shard_size=max_shard_size
        )
        if not merge:
            save_lora(wrapped, folder / ADAPTER)
        if trained.tokenizer is not None:
            processor_of(trained).save_pretrained(folder)
        if released := model.released:
            write_record(released, folder / RELEASED)
        (folder / "README.md").write_text(
            model_card(model, trained.results, source, (folder / ADAPTER).exists())
        )
    return out


def model_card(
    model: MultimodalLM, results: dict[str, Any] | None, source: str, has_adapter: bool
) -> str:
    """The card's text: what the model is made of, its results, and how to use it."""
    nodes = model.nodes or {}
    vision = (nodes.get("vision") or {}).get("name", type(model.vision).__name__)
    size = sum(p.numel() for p in model.parameters())
    rows = {
        "vision": vision,
        "connector": type(model.connector).__name__,
        "fusion": " ".join(
            filter(None, [type(model.fusion).__name__, (nodes.get("fusion") or {}).get("gate")])
        ),
        "llm": type(model.llm).__name__,
        "parameters": f"{size:,}",
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [owlfuse]",
        "---",
        "",
    ]
    lines += [
        "# A vision-language model of owlfuse",
        "",
        *([f"From {source}.", ""] if source else []),
    ]
    lines += [
        "| part | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
    ]
    if results is not None:
        lines += [
            f"## Results after {results['steps']} steps",
            "",
            "| metric | value |",
            "|---|---|",
        ]
        lines += [f"| {name} | {value:.4g} |" for name, value in results["metrics"].items()] + [""]
    lines += ["## Use", "", "```python"]
    lines += [
        "import owlfuse.artifacts.hf  # registers the model",
        "from transformers import pipeline",
        "",
    ]
    lines += ['answer = pipeline("image-text-to-text", model="THIS_FOLDER")']
    lines += [
        (
            'content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is in '
            "the "
            'picture?"}]'
        )
    ]
    lines += [
        'print(answer(text=[{"role": "user", "content": content}], return_full_text=False))',
        "```",
        "",
    ]
    if has_adapter:
        lines += [
            (
                "The weights are those *without* the LoRA adapter in `adapter/`. `owlfuse.load` "
                "and "
                "`owlfuse chat` apply it; with"
            ),
            (
                "transformers: "
                "`PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(FOLDER), "
                "FOLDER/adapter)`."
            ),
            "",
        ]
    return "\n".join(lines)
