"""What a connector is. N images, P patches, Q visual tokens per image, Dv vision width, D LLM
width, H heads, d head width, S positions of a sequence."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from owlfuse.model.parts import ModelPart


class Connector(ModelPart):
    """Features (N, P, Dv) -> visual tokens (N, Q, D). Built as `Connector(in_width=Dv,
    out_width=D, patches=P, grid=(h, w), **own arguments)`, of which the first four come from the
    other parts.

    Attributes:
        tokens: Q.
    """

    tokens: int

    def forward(self, features: Tensor) -> Tensor:
        """Returns the visual tokens of features."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another grid of patches, for pictures of another size.

        Raises:
            ValueError: the connector cannot, as by default.
        """
        raise ValueError(
            f"{type(self).__name__} has no set_grid, and pictures of another size need it"
        )

    def patch_shares(self, features: Tensor) -> Tensor:
        """Returns (N, Q, P) of which patches each visual token is made, for the maps of
        `owlfuse.evaluation.explain`: by default each of its own patch.

        Raises:
            ValueError: there are other tokens than patches, and the connector does not say.
        """
        patches = features.shape[1]
        if self.tokens != patches:
            raise ValueError(
                f"{type(self).__name__} makes {self.tokens} tokens of {patches} patches, and has "
                "no patch_shares that says of which; see owlfuse.model.connectors"
            )
        return torch.eye(patches, device=features.device).expand(len(features), -1, -1)


class QueryConnector(Connector):
    """A connector whose learned queries read the image in several layers.

    Attributes:
        layers: from first to last.
        gradient_checkpointing: activations inside of layers are dropped and computed again in the
            backward pass.
    """

    COMPUTE_ONLY: ClassVar = ("gradient_checkpointing",)

    layers: nn.ModuleList
    gradient_checkpointing: bool

    def set_checkpointing(self, enable: bool) -> None:
        """Turns `gradient_checkpointing` on or off."""
        self.gradient_checkpointing = enable

    def set_grid(self, patches: int, grid: tuple[int, int]) -> None:
        """Goes on with another grid of patches: by default nothing depends on it."""

    def blocks(self) -> list[list[nn.Parameter]]:
        """Returns the parameters of each layer, in order."""
        return [list(layer.parameters()) for layer in self.layers]

    def sharding_units(self) -> list[nn.Module]:
        """Returns the layers, each gathered on its own."""
        return list(self.layers)

    def init_linear_layers(self) -> None:
        """Gives linear layers Xavier's numbers, and biases of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def run_layers(self, queries: Tensor, *inputs: Tensor | None) -> Tensor:
        """Returns what the layers make of the queries (N, Q, their width), each being given the
        same further inputs."""
        # without gradients no backward pass would compute anything again
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if checkpointing:
                queries = checkpoint(layer, queries, *inputs, use_reentrant=False)
            else:
                queries = layer(queries, *inputs)
        return queries


def check_hidden(hidden: int | None) -> None:
    """Raises ValueError for a width of an MLP under 1; None stands for the default."""
    if hidden is not None and hidden < 1:
        raise ValueError(f"hidden is {hidden}, expected at least 1, or null for the default")


def split_heads(states: Tensor, head_width: int) -> Tensor:
    """(N, S, H * d) -> (N, H, S, d)."""
    return states.unflatten(-1, (-1, head_width)).transpose(1, 2)


def mean_weights(query: Tensor, key: Tensor) -> Tensor:
    """Returns the weights (N, Q, S) of the attention of queries (N, H, Q, d) to keys (N, H, S, d),
    the mean over heads."""
    # torch's fused attention gives no weights
    scores = query.float() @ key.float().transpose(2, 3) / query.shape[3] ** 0.5
    return scores.softmax(-1).mean(1)


def mlp_layers(
    norm: nn.Module, in_width: int, out_width: int, depth: int, bias: bool = True
) -> nn.Sequential:
    """Returns a norm and linear layers with GELU between them.

    Args:
        norm: an Identity for none, so that the numbers in the names of weights stay.
        depth: linear layers.
        bias: of the linear layers.
    """
    layers = [norm, nn.Linear(in_width, out_width, bias)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_width, out_width, bias)]
    return nn.Sequential(*layers)
