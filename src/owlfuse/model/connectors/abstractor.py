"""N images, P patches, Q queries, Dv vision width (the abstractor's own width too), D LLM width,
H heads, d head width."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.model.connectors.base import QueryConnector, check_hidden, mean_weights, split_heads
from owlfuse.model.positions import sincos_1d, sincos_2d


class Abstractor(QueryConnector):
    """The visual abstractor of mPLUG-Owl (arXiv 2304.14178) and mPLUG-Owl2 (arXiv 2311.04257, eq.
    1-2), as released.

    Learned queries attend to [queries; image] in several layers, are projected to the LLM's width,
    and a learned end token follows: Q + 1 tokens an image. The released code differs from the
    paper: queries and image are each normed first, the residual is added to the *normed* query, and
    the SwiGLU has a LayerNorm inside.

    Args:
        queries: learned queries, the visual tokens of an image.
        layers: in which the queries attend to the image.
        heads: of that attention; they divide Dv.
        end_token: a learned token follows the queries: Q + 1 tokens an image.
        positions: Owl2's fixed sin-cos tables, added to the query and key inputs (not to the
            values). Off: the Owl1 form.
        learned_slope: the slope beta of the SwiGLU's x * sigmoid(beta x) is learned, from 1, in
            place of fixed at 1.
        eps: of the LayerNorm inside the SwiGLU; the released code leaves the other norms at
            PyTorch's 1e-5.
        gradient_checkpointing: activations inside of layers are dropped and computed again in the
            backward pass.
        hidden: width of the SwiGLU; by default two thirds of 4 Dv (2730 at 1024, where the released
            models have 2816).

    Raises:
        ValueError: heads that do not divide Dv, or a count under 1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        queries: int = 64,
        layers: int = 6,
        heads: int = 16,
        hidden: int | None = None,
        positions: bool = False,
        end_token: bool = True,
        learned_slope: bool = False,
        eps: float = 1e-6,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(queries, layers, heads) < 1:
            raise ValueError(
                f"queries ({queries}), layers ({layers}) and heads ({heads}) are each at least 1"
            )
        check_hidden(hidden)
        if in_width % heads:
            raise ValueError(
                f"heads is {heads}, which does not divide the backbone's width of {in_width}"
            )
        if positions and in_width % 4:
            raise ValueError(
                f"positions need a backbone's width divisible by 4, and it is {in_width}"
            )
        self.tokens = queries + int(end_token)
        self.set_checkpointing(gradient_checkpointing)
        self.queries = nn.Parameter(torch.randn(1, queries, in_width) * 0.02)
        # a SwiGLU has three matrices: as many weights as an MLP of 4 Dv
        hidden = hidden or in_width * 8 // 3
        self.layers = nn.ModuleList(
            AbstractorLayer(in_width, heads, hidden, learned_slope, eps) for _ in range(layers)
        )
        self.proj = nn.Linear(in_width, out_width)
        if positions:
            self.register_buffer("query_positions", sincos_1d(torch.arange(queries), in_width))
            self.register_buffer("image_positions", sincos_2d(grid, patches, in_width))
        else:
            self.query_positions = self.image_positions = None
        self.reset_parameters()
        self.end_token = nn.Parameter(torch.randn(1, 1, out_width) * 0.02) if end_token else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier, and queries small beside what the image adds to them, so that tokens do not begin
        as nearly the same for every image. Attention is as sharp as with queries of size 1."""
        self.init_linear_layers()
        for layer in self.layers:
            assert isinstance(layer, AbstractorLayer)
            # a quarter the size, and four times the projection: attention is as before
            layer.query_norm.weight.fill_(0.25)
            layer.query.weight.mul_(4)

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another grid of patches: the fixed table of their positions is
        recomputed."""
        if self.image_positions is not None:
            table = sincos_2d(grid, patches, self.image_positions.shape[1])
            self.image_positions = table.to(self.image_positions)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the tokens (N, Q + 1, D) of features (N, P, Dv), the last being the end token;
        (N, Q, D) without one."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        positions = self.query_positions, self.image_positions
        tokens = self.proj(self.run_layers(queries, features, *positions))
        if self.end_token is None:
            return tokens
        # under autocast the tokens have another type than the parameter
        end_tokens = self.end_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat([tokens, end_tokens], dim=1)

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q + 1, P) of which patches each token is made, by its attention, each row
        with sum 1, that of the end token zero.

        Attention rollout (arXiv 2005.00928) through all layers: in each a query is half itself, and
        half the mean over heads of its attention to the queries and the image. The share of the
        learned queries is left out, and the patches' scaled to sum 1.
        """
        queries = self.queries.expand(features.shape[0], -1, -1)
        count = queries.shape[1]
        shares = features.new_zeros(*queries.shape[:2], features.shape[1], dtype=torch.float32)
        layer: Any
        for layer in self.layers:
            inputs = queries, features, self.query_positions, self.image_positions
            weights = layer.weights(*inputs)
            shares = (shares + weights[..., :count] @ shares + weights[..., count:]) / 2
            queries = layer(*inputs)
        shares = shares / shares.sum(-1, keepdim=True)
        return F.pad(shares, (0, 0, 0, self.tokens - count))


class AbstractorLayer(nn.Module):
    """Attention of the queries to [queries; image], then a SwiGLU: a `crossattention` layer of
    the released code."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        learned_slope: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query_norm = nn.LayerNorm(width)
        self.image_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = SwiGLU(width, hidden, learned_slope, eps)

    def forward(
        self,
        queries: Tensor,
        features: Tensor,
        query_positions: Tensor | None,
        image_positions: Tensor | None,
    ) -> Tensor:
        """queries (N, Q, Dv), features (N, P, Dv), position tables (Q, Dv) and (P, Dv) or None
        -> (N, Q, Dv)."""
        queries = self.query_norm(queries)
        query, key, value = self.heads_of(queries, features, query_positions, image_positions)
        context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        queries = queries + self.out(context)
        return queries + self.mlp(self.mlp_norm(queries))

    def heads_of(
        self,
        queries: Tensor,
        features: Tensor,
        query_positions: Tensor | None,
        image_positions: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query (N, H, Q, d), key and value (N, H, Q + P, d) of normed queries and the
        image."""
        # the released code has the queries among the keys
        values = torch.cat([queries, self.image_norm(features)], dim=1)
        query_input, key_input = queries, values
        if query_positions is not None and image_positions is not None:
            query_input = queries + query_positions.to(queries.dtype)
            key_input = values + torch.cat([query_positions, image_positions]).to(values.dtype)
        query = split_heads(self.query(query_input), self.head_width)
        key = split_heads(self.key(key_input), self.head_width)
        value = split_heads(self.value(values), self.head_width)
        return query, key, value

    def weights(
        self,
        queries: Tensor,
        features: Tensor,
        query_positions: Tensor | None,
        image_positions: Tensor | None,
    ) -> Tensor:
        """Returns the attention's weights (N, Q, Q + P), the mean over heads, for the inputs of
        `forward`."""
        queries = self.query_norm(queries)
        query, key, _ = self.heads_of(queries, features, query_positions, image_positions)
        return mean_weights(query, key)


class SwiGLU(nn.Module):
    """w2(LayerNorm(swish(w1 x) * w3 x)), swish(x) = x * sigmoid(beta x)."""

    def __init__(self, width: int, hidden: int, learned_slope: bool, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)
        self.w3 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.slope = nn.Parameter(torch.ones(1)) if learned_slope else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., Dv) -> (..., Dv)."""
        gate = self.w1(x)
        gate = F.silu(gate) if self.slope is None else gate * torch.sigmoid(self.slope * gate)
        return self.w2(self.norm(gate * self.w3(x)))
