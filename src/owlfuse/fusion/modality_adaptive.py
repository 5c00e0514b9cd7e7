"""B rows, T text positions, D LLM width, M the modality indicator (True: vision), K visual places."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.fusion.base import Fusion, splice
from owlfuse.llm import KEY_VALUE, NORMS, decoder_layers
from owlfuse.types import Batch, VisualTokens


class ModalityAdaptive(Fusion):
    """Both norms and the key and value projections of every decoder layer have a text and a visual copy, chosen by each
    token's modality; all else is shared (mPLUG-Owl2, arXiv 2311.04257, eq. 3-8).

    The visual copies start from the text's and belong to this part. Both run in every training step, whatever the batch
    holds: the text copy at every position, the visual one where the batch says that its placeholders are, so that it costs in
    proportion to them; at every position too where the batch does not say it.
    """

    def __init__(self, connector_tokens: int) -> None:
        super().__init__()
        self.tokens_per_image = connector_tokens

    def attach(self, llm: PreTrainedModel) -> None:
        """Puts a `ByModality` in the place of each norm and of each key and value projection."""
        for layer in decoder_layers(llm):
            for module, names in ((layer, NORMS), (layer.self_attn, KEY_VALUE)):
                for name in names:
                    setattr(module, name, ByModality(getattr(module, name)))
            layer.register_forward_pre_hook(hand_modality_down, with_kwargs=True)

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """The visual copies."""
        return [module.vision for module in llm.modules() if isinstance(module, ByModality)]

    def forward(
        self, embeddings: Tensor, visual: VisualTokens, batch: Batch, position_ids: Tensor, llm: PreTrainedModel
    ) -> tuple[Tensor, dict[str, Any]]:
        """See `Fusion.forward`."""
        places = batch.visual_places
        if places is not None and not len(places) and torch.is_grad_enabled():
            places = places.new_zeros(1)  # some place, of text: every parameter has a gradient, here of zero
        return splice(embeddings, visual, batch), {"modality": Modality(batch.placeholder[..., None], places)}


class Modality(NamedTuple):
    """Which positions are visual. A tuple, through which checkpointing and compilation see the tensors."""

    is_visual: Tensor
    """(B, T, 1) bool."""
    places: Tensor | None
    """(K,) places b * T + t of all the visual ones, or of one of text where there are none; None: not known."""


class ByModality(nn.Module):
    """Two copies of a module over the last dimension, one for text tokens and one for visual tokens."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.vision = copy.deepcopy(text)
        self.modality: Modality | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, the module's width). Without an indicator every token is text."""
        if self.modality is None:
            no = hidden_states.new_zeros((*hidden_states.shape[:-1], 1), dtype=torch.bool)
            return torch.where(no, self.vision(hidden_states), self.text(hidden_states))
        is_visual, places = self.modality
        text = self.text(hidden_states)
        if places is None:
            return torch.where(is_visual, self.vision(hidden_states), text)
        if not len(places):
            return text
        visual = self.vision(hidden_states.flatten(0, 1).index_select(0, places)[None])[0]
        flat = text.flatten(0, 1)
        visual = torch.where(is_visual.flatten().index_select(0, places)[:, None], visual, flat.index_select(0, places))
        return flat.index_copy(0, places, visual).view_as(text)


def hand_modality_down(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Gives the layer's `ByModality` modules the indicator of this very call. A hook on the layer, since norms and
    projections receive hidden states alone."""
    set_modality(layer, kwargs.get("modality"))
    if getattr(layer, "gradient_checkpointing", False):
        checkpoint = layer._gradient_checkpointing_func
        if not isinstance(checkpoint, CheckpointByModality):
            layer._gradient_checkpointing_func = CheckpointByModality(layer, checkpoint)


def set_modality(layer: nn.Module, modality: Modality | None) -> None:
    """Sets the indicator for the layer's next forward."""
    for module in (layer, layer.self_attn):
        for child in module.children():
            if isinstance(child, ByModality):
                child.modality = modality


class CheckpointByModality:
    """A checkpointing function of transformers that recomputes with the indicator of the call it recomputes: transformers
    checkpoints a layer's forward without its hooks, and another forward may have come in between."""

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer = layer
        self.checkpoint = checkpoint

    def __call__(self, run: partial, *args: Any) -> Any:
        def run_by_modality(*args: Any) -> Any:
            set_modality(self.layer, run.keywords.get("modality"))
            return run(*args)

        return self.checkpoint(run_by_modality, *args)
