"""N images, P patches, Q latents, Dv vision width, D LLM width (the resampler's own width too),
H query heads, K key-value heads, d head width."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.model.connectors.base import QueryConnector, check_hidden, mean_weights, split_heads


class Resampler(QueryConnector):
    """The perceiver resampler of Idefics2 (arXiv 2405.02246, section 3.2; `HuggingFaceM4/
    idefics2-8b`): Q = `queries`.

    A gated MLP brings the features to the LLM's width, and learned latents attend to [features;
    latents] in a few layers, with grouped heads, RMS norms and a gated MLP of 4 D, and a norm at
    the end. Nothing has a bias or a position: patches are a set, told apart by the backbone's own
    position embeddings. All P tokens are read, a class token included.

    Linear layers begin with Xavier's numbers, whose size at the released widths is about the 0.02
    of transformers' Idefics2; latents as normal numbers of size 0.02, as those of Flamingo's
    perceiver are random (arXiv 2204.14198), and not as Idefics2's ones, which would make all tokens
    of an image the same.

    Args:
        queries: latents, the visual tokens of an image.
        layers: in which the latents attend to the image.
        heads: H, query heads of that attention.
        kv_heads: K, of the keys and values; they divide H.
        head_dim: d.
        hidden: width of the MLP before the layers; by default 7 D / 2, as the released 14336 at
            4096.
        norm: a LayerNorm over the features, for backbones whose last block is not normed.
        gradient_checkpointing: activations inside of layers are dropped and computed again in the
            backward pass.

    Raises:
        ValueError: kv_heads that do not divide heads, or a count under 1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        patches: int,
        grid: tuple[int, int],
        queries: int = 64,
        layers: int = 3,
        heads: int = 16,
        kv_heads: int = 4,
        head_dim: int = 96,
        hidden: int | None = None,
        norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(queries, layers, heads, kv_heads, head_dim) < 1:
            raise ValueError(
                f"queries ({queries}), layers ({layers}), heads ({heads}), kv_heads ({kv_heads}) "
                f"and head_dim ({head_dim}) are each at least 1"
            )
        check_hidden(hidden)
        # query heads share a key head in groups of equal size
        if heads % kv_heads:
            raise ValueError(f"kv_heads is {kv_heads}, which does not divide the {heads} heads")
        self.tokens = queries
        self.set_checkpointing(gradient_checkpointing)
        self.norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        self.projection = GatedMLP(in_width, hidden or out_width * 7 // 2, out_width)
        # different at the start: equal latents would stay equal in every layer
        self.latents = nn.Parameter(torch.randn(queries, out_width) * 0.02)
        self.layers = nn.ModuleList(
            ResamplerLayer(out_width, heads, kv_heads, head_dim) for _ in range(layers)
        )
        self.final_norm = nn.RMSNorm(out_width, eps=1e-6)
        self.init_linear_layers()

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, Q, D)."""
        image = self.projection(self.norm(features))
        # under autocast the image has another type than the parameter
        latents = self.latents.expand(len(features), -1, -1).to(image.dtype)
        return self.final_norm(self.run_layers(latents, image))

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q, P) of which patches each token is made, by attention rollout (arXiv
        2005.00928) through the layers, each row with sum 1: in each a latent is half itself, and
        half the mean over heads of its attention; what it owes to the learned latents is left
        out."""
        image = self.projection(self.norm(features))
        latents = self.latents.expand(len(features), -1, -1).to(image.dtype)
        patches = features.shape[1]
        shares = features.new_zeros(len(features), self.tokens, patches, dtype=torch.float32)
        layer: Any
        for layer in self.layers:
            weights = layer.weights(latents, image)
            from_patches, from_latents = weights.split([patches, self.tokens], dim=2)
            shares = (shares + from_latents @ shares + from_patches) / 2
            latents = layer(latents, image)
        return shares / shares.sum(-1, keepdim=True)


class ResamplerLayer(nn.Module):
    """Attention of the latents to [image; latents], then a gated MLP: a `perceiver_resampler` layer
    of the released code."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.latents_norm = nn.RMSNorm(width, eps=1e-6)
        self.image_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = GatedMLP(width, 4 * width, width)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        """latents (N, Q, D), image (N, P, D) -> (N, Q, D)."""
        query, key, value = self.heads_of(latents, image)
        context = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        latents = latents + self.out(context.transpose(1, 2).flatten(2))
        return latents + self.mlp(self.mlp_norm(latents))

    def heads_of(self, latents: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query (N, H, Q, d), key and value (N, K, P + Q, d)."""
        latents = self.latents_norm(latents)
        # the released code has the latents among the keys
        sequence = torch.cat([self.image_norm(image), latents], dim=1)
        query = split_heads(self.query(latents), self.head_dim)
        key = split_heads(self.key(sequence), self.head_dim)
        value = split_heads(self.value(sequence), self.head_dim)
        return query, key, value

    def weights(self, latents: Tensor, image: Tensor) -> Tensor:
        """Returns the attention's weights (N, Q, P + Q), the mean over heads, for the inputs of
        `forward`."""
        query, key, _ = self.heads_of(latents, image)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return mean_weights(query, key)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), without biases."""

    def __init__(self, in_width: int, hidden: int, out_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_width, hidden, bias=False)
        self.up = nn.Linear(in_width, hidden, bias=False)
        self.down = nn.Linear(hidden, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_width) -> (..., out_width)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
