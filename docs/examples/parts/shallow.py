"""An LLM with its first layers alone."""

from typing import Any

from transformers import PreTrainedModel

from owlfuse.model.layouts import decoder_layers
from owlfuse.model.llm import load_llm


def load_shallow(
    vocab_size: int, keep: int, pretrained: str | None = None, config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """As `load_llm`, without the decoder layers after the first `keep`.

    Raises:
        ValueError: more layers than the LLM has, or none.
    """
    llm = load_llm(vocab_size, pretrained=pretrained, config=config)
    layers = decoder_layers(llm)
    if not 1 <= keep <= len(layers):
        raise ValueError(f"keep is {keep}, and the LLM has {len(layers)} layers")
    del layers[keep:]
    llm.config.num_hidden_layers = keep
    if getattr(llm.config, "layer_types", None):  # full or sliding attention, by layer
        llm.config.layer_types = llm.config.layer_types[:keep]
    return llm
