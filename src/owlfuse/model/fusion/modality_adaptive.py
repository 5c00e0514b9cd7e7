"""B rows, T text positions, D LLM width, M the modality indicator (True: vision), K visual
positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import Fusion, splice
from owlfuse.model.layouts import decoder_layers, norms_of, projection_of, split_fused


class ModalityAdaptive(Fusion):
    """Both norms and the key and value projections of every decoder layer have a text and a visual
    copy, chosen by each token's modality; all else is shared (mPLUG-Owl2, arXiv 2311.04257, eq.
    3-8).

    The visual copies start from the text's and belong to this part. Both run in every training
    step, whatever the batch holds. Where the batch says how many positions are visual, a token is
    multiplied by the projections of its own modality alone; where it does not, every token by both.
    """

    needs: ClassVar = ("inputs_embeds", "layers", "attention", "norms", "separate_keys_values")

    def __init__(self, connector_tokens: int) -> None:
        super().__init__()
        self.tokens_per_image = connector_tokens

    def attach(self, llm: PreTrainedModel) -> None:
        """Replaces each norm and each key and value projection by a `ByModality`."""
        layer: Any
        for layer in decoder_layers(llm):
            split_fused(llm, layer)
            for norm in norms_of(llm, layer):
                norm.put(ByModality(norm.module))
            for projection in (
                projection_of(llm, layer, "key"),
                projection_of(llm, layer, "value"),
            ):
                projection.put(ProjectionByModality(projection.module))
            layer.register_forward_pre_hook(set_modality_hook, with_kwargs=True)

    def owned(self, llm: PreTrainedModel) -> list[nn.Module]:
        """Returns the visual copies."""
        return [module.vision for module in llm.modules() if isinstance(module, ByModality)]

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the embeddings with visual tokens among them, and for the layers the modality of
        each token."""
        return splice(embeddings, visual, batch), {"modality": Modality.of(batch)}


class Modality(NamedTuple):
    """Which positions are visual.

    A tuple, through which checkpointing and compilation see the tensors.
    """

    is_visual: Tensor
    """(B, T, 1) bool."""
    count: int | None = None  # type: ignore[assignment]  # a tuple's own count is not needed
    """K, of the visual positions; None: not known, and both copies run everywhere."""
    order: Tensor | None = None
    """(B * T,) positions b * T + t, those of text first, both ascending."""
    inverse: Tensor | None = None
    """(B * T,) the index of each position in `order`."""

    @classmethod
    def of(cls, batch: Batch) -> Modality:
        """Returns the modality of a batch's positions."""
        is_visual = batch.placeholder[..., None]
        if batch.visual_count is None:
            return cls(is_visual)
        # stable: each kind stays in the rows' order, and the sort reads no tensor back
        order = is_visual.flatten().byte().argsort(stable=True)
        return cls(is_visual, batch.visual_count, order, order.argsort())


class ByModality(nn.Module):
    """Two copies of a module over the last dimension, one for text tokens and one for visual
    tokens."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.vision = copy.deepcopy(text)
        self.modality: Modality | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns (B, T, the module's width) of (B, T, D). Without an indicator every token is
        text."""
        if self.modality is None:
            return self.text_alone(hidden_states)
        # decoding, where a count would wait for the device in every step
        if self.modality.count is None:
            return torch.where(
                self.modality.is_visual, self.vision(hidden_states), self.text(hidden_states)
            )
        if self.modality.count == 0:
            return self.text_alone(hidden_states)
        return self.split_by_modality(hidden_states, self.modality)

    def text_alone(self, hidden_states: Tensor) -> Tensor:
        """Returns the text copy's result. While gradients are computed the visual copy has some
        too, of zero, from one token: every rank has to have the same gradients."""
        text = self.text(hidden_states)
        if not torch.is_grad_enabled():
            return text
        # added to the text, times zero: autograd drops a result that nothing uses
        return text.index_add(
            1, text.new_zeros(1, dtype=torch.long), self.vision(hidden_states[:, :1]) * 0
        )

    def split_by_modality(self, hidden_states: Tensor, modality: Modality) -> Tensor:
        """Returns the text copy's result at every position, which is cheaper for a norm than to
        gather them, and the visual one's at visual positions."""
        assert modality.order is not None
        assert modality.count is not None
        visual_positions = modality.order[-modality.count :]
        text = self.text(hidden_states)
        visual_states = hidden_states.flatten(0, 1).index_select(0, visual_positions)
        visual = self.vision(visual_states[None])[0]
        return text.flatten(0, 1).index_copy(0, visual_positions, visual).view_as(text)


class ProjectionByModality(ByModality):
    """Two copies of a projection, each of which multiplies the tokens of its modality alone."""

    def split_by_modality(self, hidden_states: Tensor, modality: Modality) -> Tensor:
        """Returns each copy's result at the positions of its modality."""
        assert modality.count is not None
        flat = Permuted.apply(hidden_states.flatten(0, 1), modality.order, modality.inverse)
        text, visual = flat.split([len(flat) - modality.count, modality.count])
        joined = torch.cat([self.text(text[None]), self.vision(visual[None])], dim=1)[0]
        restored = Permuted.apply(joined, modality.inverse, modality.order)
        return restored.view(*hidden_states.shape[:2], -1)


class Permuted(torch.autograd.Function):
    """Permutes the rows of a matrix. Its gradient is permuted back, where that of `index_select` is
    added up row by row, as if an index could occur twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """(R, D) -> (R, D)."""
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(R, D) -> (R, D)."""
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def set_modality_hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Gives the layer's `ByModality` modules the indicator of this call. A hook on the layer, since
    norms and projections receive hidden states alone."""
    set_modality(layer, kwargs.get("modality"))
    if getattr(layer, "gradient_checkpointing", False):
        # private: transformers has no other way to replace a layer's checkpointing
        # set by transformers at each call of gradient_checkpointing_enable
        checkpoint = layer._gradient_checkpointing_func
        if not isinstance(checkpoint, CheckpointByModality):
            layer._gradient_checkpointing_func = CheckpointByModality(layer, checkpoint)


def set_modality(layer: Any, modality: Modality | None) -> None:
    """Sets the indicator for the layer's next forward."""
    for module in layer.modules():
        if isinstance(module, ByModality):
            module.modality = modality


class CheckpointByModality:
    """A checkpointing function of transformers that recomputes with the indicator of the call it
    recomputes: transformers checkpoints a layer's forward without its hooks, and another forward
    may have come in between."""

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer = layer
        self.checkpoint = checkpoint

    def __call__(self, run: partial, *args: Any) -> Any:
        def run_by_modality(*args: Any) -> Any:
            set_modality(self.layer, run.keywords.get("modality"))
            return run(*args)

        return self.checkpoint(run_by_modality, *args)
