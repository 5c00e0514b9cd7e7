"""B rows, T text positions, D LLM width, K visual positions."""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import Fusion, splice
from owlfuse.model.fusion.layer_state import ARGUMENT, LayerState
from owlfuse.model.layouts import (
    Need,
    decoder_layers,
    mlp_of,
    norms_of,
    projection_of,
    split_fused,
)

Copy = Literal["norms", "key", "value", "query", "output", "mlp"]
DEFAULT_COPIES: tuple[Copy, ...] = ("norms", "key", "value")
NEEDS: dict[Copy, tuple[Need, ...]] = {
    "norms": ("norms",),
    "key": ("attention", "separate_keys_values"),
    "value": ("attention", "separate_keys_values"),
    "query": ("attention", "separate_keys_values"),
    "output": ("attention",),
    "mlp": ("mlp",),
}


class ModalityAdaptive(Fusion):
    """Some modules of every decoder layer have a text and a visual copy, chosen by each token's
    modality; all else is shared. With both norms and the key and value projections it is
    mPLUG-Owl2's (arXiv 2311.04257, eq. 3-8). With the projections and the MLP it is the visual
    expert of CogVLM (arXiv 2311.03079, section 2.1), whose norms are shared; with all six, a
    mixture of transformers (arXiv 2411.04996, algorithm 1) of which text and visual tokens have one
    each, but for further norms, as Qwen3's of queries and keys, and Gemma's behind attention and
    MLP, which are shared.

    The visual copies start from the text's and belong to this part. Both run in every training
    step, whatever the batch holds. Where the batch says how many positions are visual, a token is
    multiplied by the projections of its own modality alone; where it does not, every token by both.

    Args:
        copies: what has two copies, of `norms`, `key`, `value`, `query`, `output`, `mlp`.

    Raises:
        ValueError: no copies, one twice, or an unknown one; from `attach`, an LLM whose layers do
            not have them as modules of their own, or which have no weights.
    """

    def __init__(self, connector_tokens: int, copies: list[Copy] | None = None) -> None:
        super().__init__()
        self.tokens_per_image = connector_tokens
        self.copies = list(DEFAULT_COPIES if copies is None else copies)
        if not self.copies or len(set(self.copies)) < len(self.copies):
            raise ValueError(f"copies {self.copies}: give at least one, and each once")
        if unknown := sorted(set(self.copies) - set(get_args(Copy))):
            raise ValueError(f"copies {unknown} are unknown; there are {', '.join(get_args(Copy))}")
        needs: list[Need] = ["inputs_embeds", "layers"]
        for name in self.copies:
            needs += NEEDS[name]
        self.needs = tuple(dict.fromkeys(needs))
        self.state: LayerState[Modality] = LayerState()

    def attach(self, llm: PreTrainedModel) -> None:
        """Replaces each of the modules that have copies by a `ByModality`."""
        layers = decoder_layers(llm)
        for layer in layers:
            # first: a copy of the fused projection would be one of queries, too
            if "separate_keys_values" in self.needs:
                split_fused(llm, layer)
            for name in self.copies:
                self.copy_modules(llm, layer, name)
        if not any(list(module.parameters()) for module in self.owned(llm)):
            raise ValueError(
                f"copies: the {' and '.join(self.copies)} of {type(llm).__name__} have no weights, "
                "so that nothing would have two copies; name others"
            )
        self.state.attach(llm, layers)

    def copy_modules(self, llm: PreTrainedModel, layer: nn.Module, name: Copy) -> None:
        """Replaces the modules of a layer that one of `copies` names."""
        if name == "norms":
            for norm in norms_of(llm, layer):
                norm.put(ByModality(norm.module, self.state))
        elif name == "mlp":
            mlp = mlp_of(llm, layer)
            check_mlp(llm, mlp.module)
            if getattr(layer, "enable_moe_block", False):
                raise ValueError(
                    f"copies: mlp: {type(layer).__name__} has experts beside its MLP, which would "
                    "be shared; leave mlp out, or choose another LLM"
                )
            mlp.put(ProjectionByModality(mlp.module, self.state))
        else:
            projection = projection_of(llm, layer, name)
            projection.put(ProjectionByModality(projection.module, self.state))

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
        return splice(embeddings, visual, batch), {ARGUMENT: Modality.of(batch)}


def check_mlp(llm: PreTrainedModel, mlp: nn.Module) -> None:
    """Raises ValueError for an MLP with weights other than those of linear layers, as a mixture of
    experts has, whose router would see a part of the tokens."""
    linear: set[int] = set()
    for module in mlp.modules():
        if isinstance(module, nn.Linear | Conv1D):
            # by identity: tensors would compare their numbers
            linear.update(id(parameter) for parameter in module.parameters())
    if not linear or linear != {id(parameter) for parameter in mlp.parameters()}:
        raise ValueError(
            f"copies: mlp: {type(mlp).__name__} of {type(llm).__name__} is no MLP of linear layers "
            "alone; leave mlp out, or choose another LLM"
        )


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

    def __init__(self, text: nn.Module, state: LayerState[Modality]) -> None:
        super().__init__()
        self.text = text
        self.vision = copy.deepcopy(text)
        self.state = state

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns (B, T, the module's width) of (B, T, D). Without an indicator every token is
        text."""
        modality = self.state.value
        if modality is None:
            return self.text_alone(hidden_states)
        # decoding, where a count would wait for the device in every step
        if modality.count is None:
            return torch.where(
                modality.is_visual, self.vision(hidden_states), self.text(hidden_states)
            )
        if modality.count == 0:
            return self.text_alone(hidden_states)
        return self.split_by_modality(hidden_states, modality)

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
        # sorted, they stand behind those of text
        visual_positions = modality.order[-modality.count :]
        text = self.text(hidden_states)
        visual_states = hidden_states.flatten(0, 1).index_select(0, visual_positions)
        # as one row, since modules are given (B, T, D)
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
