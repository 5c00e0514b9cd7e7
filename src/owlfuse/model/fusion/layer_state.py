"""A way for a fusion to reach the layers of an LLM during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import nn
from transformers import PreTrainedModel

ARGUMENT = "fusion_state"
"""The keyword argument of the LLM's forward that a `LayerState` takes away before the LLM sees
it."""

Value = TypeVar("Value")


class LayerState(Generic[Value]):
    """What a fusion hands to its modules and hooks inside of the LLM, for one forward pass of one
    LLM.

    A fusion's forward returns the value as the argument `ARGUMENT`. It goes past the LLM's own
    code, so that decoder layers that hand no keyword arguments down are reached too. A layer whose
    activations are computed again in the backward pass then has the value of the forward pass that
    it repeats, whatever came in between. A model runs one forward pass at a time.

    Attributes:
        value: None outside of a forward pass, and in one that was given none.
    """

    def __init__(self) -> None:
        self.value: Value | None = None
        self.layers: list[Any] = []

    def __repr__(self) -> str:
        # without an address: probes are cached by what a fusion's attributes print
        return "LayerState()"

    def attach(self, llm: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
        """Gives the state its value around each forward pass of the LLM.

        Args:
            layers: the decoder layers that read it.
        """
        self.layers = list(layers)
        llm.register_forward_pre_hook(self.begin, with_kwargs=True)
        # after a failure too: the next forward pass may be given no value
        llm.register_forward_hook(self.end, always_call=True)

    def begin(
        self, llm: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Takes the value out of the arguments of the LLM's forward."""
        # in every forward pass, since checkpointing may be turned on at any time
        for layer in self.layers:
            if getattr(layer, "gradient_checkpointing", False):
                self.wrap_checkpointing(layer)
        kwargs = dict(kwargs)
        self.value = kwargs.pop(ARGUMENT, None)
        return args, kwargs

    def end(self, llm: nn.Module, args: tuple, output: Any) -> None:
        """Forgets the value."""
        self.value = None

    def wrap_checkpointing(self, layer: Any) -> None:
        """Makes a layer's checkpointing repeat the forward pass with the value that it had."""
        # private: transformers has no other way to replace a layer's checkpointing, and sets it at
        # each call of gradient_checkpointing_enable
        checkpoint = layer._gradient_checkpointing_func
        if not isinstance(checkpoint, CheckpointWithState):
            layer._gradient_checkpointing_func = CheckpointWithState(self, checkpoint)


class CheckpointWithState:
    """A checkpointing function of transformers that recomputes with the state of the call that it
    recomputes."""

    def __init__(self, state: LayerState[Any], checkpoint: Callable[..., Any]) -> None:
        self.state = state
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        value = self.state.value

        def run_with_value(*args: Any) -> Any:
            before = self.state.value
            self.state.value = value
            try:
                return run(*args)
            finally:
                self.state.value = before

        return self.checkpoint(run_with_value, *args)
