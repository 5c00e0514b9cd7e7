"""README.md of an exported model."""

from __future__ import annotations

from typing import Any

from owlfuse.model import MultimodalLM


def model_card(model: MultimodalLM, results: dict[str, Any] | None, source: str, has_adapter: bool) -> str:
    """The card's text: what the model is made of, its results, and how to use it."""
    nodes = model.nodes or {}
    vision = (nodes.get("vision") or {}).get("name", type(model.vision).__name__)
    size = sum(p.numel() for p in model.parameters())
    rows = {
        "vision": vision,
        "connector": type(model.connector).__name__,
        "fusion": " ".join(filter(None, [type(model.fusion).__name__, (nodes.get("fusion") or {}).get("gate")])),
        "llm": type(model.llm).__name__,
        "parameters": f"{size:,}",
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [owlfuse]", "---", ""]
    lines += ["# A vision-language model of owlfuse", "", *([f"From {source}.", ""] if source else [])]
    lines += ["| part | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    if results is not None:
        lines += [f"## Results after {results['steps']} steps", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in results["metrics"].items()] + [""]
    lines += ["## Use", "", "```python", "import owlfuse", "from transformers import pipeline", ""]
    lines += ['answer = pipeline("image-text-to-text", model="THIS_FOLDER")']
    lines += ['content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is in the picture?"}]']
    lines += ['print(answer(text=[{"role": "user", "content": content}], return_full_text=False))', "```", ""]
    if has_adapter:
        lines += [
            "The weights are those *without* the LoRA adapter in `adapter/`. `owlfuse.load` and `owlfuse chat` apply it; with",
            "transformers: `PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(FOLDER), FOLDER/adapter)`.",
            "",
        ]
    return "\n".join(lines)
