"""N images, L extra levels, Q visual tokens per image, B rows, T text positions, D LLM width."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.connectors.base import Connector
from owlfuse.model.fusion.base import Fusion, splice, token_order
from owlfuse.model.fusion.layer_state import ARGUMENT, LayerState
from owlfuse.model.layouts import Need, decoder_layers


class DeepStack(Fusion):
    """Visual tokens stand among the text embeddings, and those of the backbone's extra levels are
    added at the same positions behind the first decoder layers, one level a layer, from shallow to
    deep: DeepStack (arXiv 2406.04334) as Qwen3-VL has it (arXiv 2511.21631, section 2).

    Each level has a connector of its own, which begins as a copy of the model's and belongs to this
    part.

    Raises:
        ValueError: from `set_levels`, a backbone without extra levels; from `attach`, more of them
            than decoder layers.
    """

    needs: tuple[Need, ...] = ("inputs_embeds", "layers")

    def __init__(self, connector_tokens: int) -> None:
        super().__init__()
        self.tokens_per_image = connector_tokens
        self.connectors = nn.ModuleList()
        self.state: LayerState[LevelTokens] = LayerState()

    def set_levels(self, levels: int, connector: Connector) -> None:
        """Makes a connector for each level.

        Raises:
            ValueError: there are no levels.
        """
        if levels == 0:
            raise ValueError(
                "deepstack adds features of several levels of the backbone, and this one gives "
                "one; set model.vision.levels to some of its blocks, and model.vision.join=separate"
            )
        self.levels = levels
        self.connectors.extend(copy.deepcopy(connector) for _ in range(levels))

    def level_connectors(self) -> list[Connector]:
        """Returns the connectors, from the shallowest level on."""
        connectors: list[Any] = list(self.connectors)
        return connectors

    def attach(self, llm: PreTrainedModel) -> None:
        """Adds hooks to the first layers."""
        layers = decoder_layers(llm)
        if self.levels > len(layers):
            raise ValueError(
                f"deepstack needs a decoder layer for each of the {self.levels} extra levels, and "
                f"the LLM has {len(layers)}; give model.vision.levels fewer"
            )
        for level in range(self.levels):
            # a partial and no inner function: a copy of the model has to get the copy's state
            layers[level].register_forward_hook(partial(add_level, self.state, level))
        self.state.attach(llm, layers[: self.levels])

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the embeddings with visual tokens among them, and for the layers those of the
        levels."""
        embeddings = splice(embeddings, visual, batch)
        if visual.levels is None:
            raise ValueError("deepstack needs visual tokens of the backbone's extra levels")
        order = token_order(visual, batch)
        # images one behind the other, as `token_order` counts their tokens
        tokens = visual.levels.flatten(1, 2)
        return embeddings, {ARGUMENT: LevelTokens(tokens, order, batch.placeholder[..., None])}


class LevelTokens(NamedTuple):
    """The visual tokens of the extra levels, and where they stand.

    A tuple, through which checkpointing and compilation see the tensors.
    """

    tokens: Tensor
    """(L, N * Q, D)."""
    order: Tensor
    """(B, T) of `token_order`."""
    is_visual: Tensor
    """(B, T, 1) bool."""


def add_level(
    state: LayerState[LevelTokens], level: int, layer: nn.Module, args: tuple, output: Any
) -> Any:
    """Returns a decoder layer's output, (B, T, D) or a tuple that begins with it, with the tokens
    of a level added at visual positions."""
    # the LLM was called by itself, without the fusion
    if state.value is None:
        return output
    tokens, order, is_visual = state.value
    hidden_states = output[0] if isinstance(output, tuple) else output
    update = tokens[level][order].to(hidden_states.dtype)
    # selected everywhere: an index of the visual positions would have a shape of the data
    hidden_states = hidden_states + torch.where(is_visual, update, torch.zeros_like(update))
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
