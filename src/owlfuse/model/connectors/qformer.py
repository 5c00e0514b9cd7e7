"""N images, P patches, Q queries, C the Q-Former's own width, Dv vision width, D LLM width, H
heads, d head width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.model.connectors.base import QueryConnector, check_hidden, mean_weights, split_heads

EPS = 1e-12
"""Of BERT's norms, which the Q-Former was made of."""


class QFormer(QueryConnector):
    """The Q-Former of BLIP-2 (arXiv 2301.12597, section 3.1; `Salesforce/blip2-opt-2.7b`) as a
    connector: Q = `queries`.

    Learned queries pass BERT layers, which norm behind each residual sum: attention among the
    queries, in every n-th layer attention to the image, and an MLP with GELU. A linear layer brings
    them to the LLM's width. The branch for texts, which BLIP-2 uses in its first stage alone, and
    BERT's dropout are left out. Patches are a set, told apart by the backbone's own position
    embeddings; all P tokens are read, a class token included.

    Linear layers begin with Xavier's numbers, as the abstractors do here: BLIP-2 begins from a
    trained BERT, which other widths do not have, and BERT's own 0.02 is small at small widths.
    Queries begin as normal numbers of size 0.02, as in LAVIS.

    Args:
        queries: visual tokens of an image.
        layers: BERT layers.
        heads: H, which divide `width`.
        width: C.
        hidden: width of the MLPs; by default 4 C, as BERT's.
        cross_every: layers 0, n, 2 n, ... attend to the image.
        norm: a LayerNorm over the features, BLIP-2's `ln_vision`, for backbones whose last block is
            not normed.
        gradient_checkpointing: activations inside of layers are dropped and computed again in the
            backward pass.

    Raises:
        ValueError: heads that do not divide the width, or a count under 1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        queries: int = 32,
        layers: int = 12,
        heads: int = 12,
        width: int = 768,
        hidden: int | None = None,
        cross_every: int = 2,
        norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(queries, layers, heads, width, cross_every) < 1:
            raise ValueError(
                f"queries ({queries}), layers ({layers}), heads ({heads}), width ({width}) and "
                f"cross_every ({cross_every}) are each at least 1"
            )
        check_hidden(hidden)
        if width % heads:
            raise ValueError(f"heads is {heads}, which does not divide the width of {width}")
        self.tokens = queries
        self.set_checkpointing(gradient_checkpointing)
        self.norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        # different at the start: equal queries would stay equal in every layer
        self.queries = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.query_norm = nn.LayerNorm(width, eps=EPS)
        self.layers = nn.ModuleList()
        for index in range(layers):
            image_width = in_width if index % cross_every == 0 else None
            self.layers.append(QFormerLayer(width, heads, hidden or 4 * width, image_width))
        self.proj = nn.Linear(width, out_width)
        self.init_linear_layers()

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, Q, D)."""
        image = self.norm(features)
        states = self.query_norm(self.queries).expand(len(features), -1, -1)
        return self.proj(self.run_layers(states, image))

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q, P) of which patches each token is made, by attention rollout (arXiv
        2005.00928) through the layers, each row with sum 1: in each attention a query is half
        itself, and half the mean over heads of what it attends to."""
        image = self.norm(features)
        states = self.query_norm(self.queries).expand(len(features), -1, -1)
        shape = len(features), self.tokens, features.shape[1]
        shares = features.new_zeros(shape, dtype=torch.float32)
        layer: Any
        for layer in self.layers:
            shares = (shares + layer.self_attention.weights(states, states) @ shares) / 2
            if layer.cross_attention is not None:
                # the layer attends to the image with what its first attention gives
                attended = layer.self_attention(states, states)
                shares = (shares + layer.cross_attention.weights(attended, image)) / 2
            states = layer(states, image)
        return shares / shares.sum(-1, keepdim=True)


class QFormerLayer(nn.Module):
    """A layer of BERT for the queries.

    Args:
        image_width: Dv, of the image that the queries attend to; None: they do not.
    """

    def __init__(self, width: int, heads: int, hidden: int, image_width: int | None) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, width)
        self.cross_attention = None if image_width is None else Attention(width, heads, image_width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, states: Tensor, image: Tensor) -> Tensor:
        """states (N, Q, C), image (N, P, Dv) -> (N, Q, C)."""
        states = self.self_attention(states, states)
        if self.cross_attention is not None:
            states = self.cross_attention(states, image)
        return self.mlp_norm(states + self.down(F.gelu(self.up(states))))


class Attention(nn.Module):
    """Attention of C-wide states to a sequence of another width, the residual sum and its norm."""

    def __init__(self, width: int, heads: int, sequence_width: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(sequence_width, width)
        self.value = nn.Linear(sequence_width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, states: Tensor, sequence: Tensor) -> Tensor:
        """states (N, Q, C), sequence (N, S, width of it) -> (N, Q, C)."""
        query = split_heads(self.query(states), self.head_width)
        key = split_heads(self.key(sequence), self.head_width)
        value = split_heads(self.value(sequence), self.head_width)
        context = F.scaled_dot_product_attention(query, key, value)
        return self.norm(states + self.out(context.transpose(1, 2).flatten(2)))

    def weights(self, states: Tensor, sequence: Tensor) -> Tensor:
        """Returns the attention's weights (N, Q, S), the mean over heads, for the inputs of
        `forward`."""
        query = split_heads(self.query(states), self.head_width)
        key = split_heads(self.key(sequence), self.head_width)
        return mean_weights(query, key)
