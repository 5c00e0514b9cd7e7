"""A run, or any model, as a folder that transformers, peft and owlfuse read; and reading one.

OUT/ holds config.json, model.safetensors (in shards over a size), generation_config.json, the
tokenizer with its chat template, processor_config.json, README.md (the model card) and, of a run
with LoRA, adapter/ in peft's format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment

from owlfuse.artifacts.load import ADAPTER, RELEASED, TrainedModel, make_processor, wrap
from owlfuse.artifacts.lora import merge_lora, save_lora, without_lora
from owlfuse.artifacts.released.saving import write_record
from owlfuse.artifacts.runs import numbers_of
from owlfuse.core.files import atomic_directory
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.quantization import count_parameters

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [owlfuse]
---

# A vision-language model of owlfuse

{% if source %}
From {{ source }}.

{% endif %}
| part | |
|---|---|
| vision | {{ vision }} |
| connector | {{ connector }} |
| fusion | {{ fusion }} |
| llm | {{ llm }} |
| parameters | {{ parameters }} |

{% if metrics %}
## Results after {{ results.steps }} steps

| metric | value |
|---|---|
{% for name, value in metrics.items() %}
| {{ name }} | {{ value }} |
{% endfor %}

{% endif %}
## Use

```python
import owlfuse.artifacts.hf  # registers the model
from transformers import pipeline

answer = pipeline("image-text-to-text", model="THIS_FOLDER")
content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is in the picture?"}]
chat = [{"role": "user", "content": content}]
{% if ends_by_text %}
# answers end with a text, which transformers looks for by the tokenizer
options = {"tokenizer": answer.tokenizer}
print(answer(text=chat, return_full_text=False, generate_kwargs=options))
{% else %}
print(answer(text=chat, return_full_text=False))
{% endif %}
```
{% if has_adapter %}

The weights are those *without* the LoRA adapter in `adapter/`. `owlfuse.load` and `owlfuse chat` \
apply it; with
transformers: `PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(FOLDER), \
FOLDER/adapter)`.
{% endif %}
"""
"""README.md of an export, a jinja template."""


def export(
    trained: TrainedModel,
    out: Path,
    merge: bool = False,
    max_shard_size: str = "5GB",
    source: str = "",
) -> Path:
    """Writes OUT atomically.

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
        # before the weights, which take long: it refuses updates that do not fit one adapter
        if not merge:
            save_lora(wrapped, folder / ADAPTER)
        wrapped.save_pretrained(
            folder, state_dict=without_lora(wrapped), max_shard_size=max_shard_size
        )
        # released weights may come without a tokenizer
        if trained.tokenizer is not None:
            make_processor(trained).save_pretrained(folder)
        # so that an imported model can be written in the released layout again
        if released := model.released:
            write_record(released, folder / RELEASED)
        (folder / "README.md").write_text(
            model_card(
                model,
                trained.results,
                source,
                has_adapter=(folder / ADAPTER).exists(),
                ends_by_text=bool(wrapped.generation_config.stop_strings),
            )
        )
    return out


def model_card(
    model: MultimodalLM,
    results: dict[str, Any] | None,
    source: str,
    has_adapter: bool,
    ends_by_text: bool,
) -> str:
    """Returns the card's text: what the model is made of, its results, and how to use it."""
    nodes = model.nodes or {}
    vision = (nodes.get("vision") or {}).get("name", type(model.vision).__name__)
    gate = (nodes.get("fusion") or {}).get("gate")
    fusion = type(model.fusion).__name__
    # two weights in 4 bits share a byte, so numel() would give half of them
    parameters = count_parameters(model)
    metrics = {name: f"{value:.4g}" for name, value in numbers_of(results or {}).items()}
    template = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.from_string(CARD).render(
        source=source,
        vision=vision,
        connector=type(model.connector).__name__,
        fusion=f"{fusion} {gate}" if gate else fusion,
        llm=type(model.llm).__name__,
        parameters=f"{parameters:,}",
        results=results,
        metrics=metrics,
        has_adapter=has_adapter,
        ends_by_text=ends_by_text,
    )
