"""B rows, I the most images of a row, Q visual tokens per image, T text positions, T' positions of
keys, D LLM width."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    or_masks,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owlfuse.core.types import Batch, VisualTokens
from owlfuse.model.fusion.base import Fusion, image_slots, splice
from owlfuse.model.llm import attention_function, attention_name
from owlfuse.model.parts import check_choice

Attention = Literal["causal", "bidirectional"]

ARGUMENT = "image_numbers"
"""The keyword argument of the LLM's forward that `begin_forward` takes away before the LLM sees
it."""


class Concat(Fusion):
    """Visual tokens stand among the text embeddings, as in mPLUG-Owl (arXiv 2304.14178).

    Args:
        attention: whether an image's tokens see only what stands before them (`causal`), or also
            the later tokens of their own image (`bidirectional`, as in Gemma 3, arXiv 2503.19786;
            PaliGemma, arXiv 2407.07726, has the same among the tokens of its one picture, and lets
            its question see itself too, which this does not). An image's tokens all see each other
            in layers with a sliding window, too.

    Raises:
        ValueError: an unknown attention; from `attach`, flash attention, which has no mask that
            says who sees whom.
    """

    def __init__(
        self,
        connector_tokens: int,
        attention: Attention = "causal",
    ) -> None:
        super().__init__()
        check_choice("attention", attention, Attention)
        self.tokens_per_image = connector_tokens
        self.attention = attention

    def attach(self, llm: PreTrainedModel) -> None:
        """Makes transformers build the LLM's masks by `mask_with_images`, if attention is
        bidirectional."""
        if self.attention == "causal":
            return
        plain = attention_name(llm)
        if "flash" in plain:
            raise ValueError(
                f"attention: bidirectional needs masks, which {plain} has not; set "
                "model.llm.attention=sdpa"
            )
        name = f"owlfuse_bidirectional_{plain}"
        ALL_ATTENTION_FUNCTIONS.register(name, attention_function(plain))
        plain_mask = ALL_MASK_ATTENTION_FUNCTIONS[plain]
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(mask_with_images, plain_mask))
        # registered functions are global, this setting is the LLM's own
        llm.set_attn_implementation(name)
        llm.register_forward_pre_hook(begin_forward, with_kwargs=True)
        # after a failure too: the next forward pass may be another LLM's
        llm.register_forward_hook(end_forward, always_call=True)

    def forward(
        self,
        embeddings: Tensor,
        visual: VisualTokens,
        batch: Batch,
        position_ids: Tensor,
        llm: PreTrainedModel,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the embeddings with visual tokens among them."""
        embeddings = splice(embeddings, visual, batch)
        # without visual positions, as in decoding, masks are the plain LLM's
        if self.attention == "causal" or not batch.has_images or batch.visual_count == 0:
            return embeddings, {}
        length = batch.attention_mask.shape[1]
        # a piece of a prompt: the check reads a tensor, which training must not wait for
        if embeddings.shape[1] < length:
            check_images_whole(visual, self.tokens_per_image, batch)
        return embeddings, {ARGUMENT: image_numbers(visual, self.tokens_per_image, length)}


def image_numbers(visual: VisualTokens, per_image: int, length: int) -> Tensor:
    """Returns which of its row's images stands at each of `length` positions, (B, T); -1 at
    text."""
    positions = torch.arange(length, device=visual.image_positions.device)
    slot, offset = image_slots(visual, positions)
    # an answer lies behind T, where images that a row does not have would begin
    has_image = visual.image_index.gather(1, slot) >= 0
    return torch.where(has_image & (offset >= 0) & (offset < per_image), slot, -1)


def check_images_whole(visual: VisualTokens, per_image: int, batch: Batch) -> None:
    """Raises ValueError where a piece of a prompt, behind what a cache holds, begins inside of an
    image: that image's first tokens were computed without the others."""
    first = batch.attention_mask.shape[1] - batch.input_ids.shape[1]
    starts = visual.image_positions
    is_cut = (starts < first) & (first < starts + per_image) & (visual.image_index >= 0)
    if is_cut.any():
        raise ValueError(
            f"attention: bidirectional needs an image's {per_image} tokens in one forward pass, "
            f"and the cache ends inside of an image, at position {first}; give the prompt whole"
        )


@dataclass
class NumberedImages:
    """The images of the LLM's present forward pass."""

    numbers: Tensor
    """(B, T') of `image_numbers`."""
    masks: int = 0
    """How many masks were built with them."""


ACTIVE: ContextVar[NumberedImages | None] = ContextVar("images", default=None)
"""Of this thread's forward pass, since transformers' mask functions are given no more than the
LLM's configuration."""


def begin_forward(
    llm: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Takes the images' numbers out of the arguments of the LLM's forward, for the functions that
    build its masks."""
    kwargs = dict(kwargs)
    numbers = kwargs.pop(ARGUMENT, None)
    ACTIVE.set(None if numbers is None else NumberedImages(numbers))
    return args, kwargs


def end_forward(llm: nn.Module, args: tuple, output: Any) -> None:
    """Forgets the images.

    Raises:
        ValueError: the LLM has built no mask with them.
    """
    images = ACTIVE.get()
    ACTIVE.set(None)
    if images is not None and images.masks == 0:
        raise ValueError(
            f"attention: bidirectional has no effect on {type(llm).__name__}, which does not "
            "build its masks by transformers' functions; take causal, or another LLM"
        )


def mask_with_images(
    plain: Callable[..., Tensor | None],
    mask_function: Callable[..., Any] = causal_mask_function,
    **arguments: Any,
) -> Tensor | None:
    """Builds a mask as `plain`, one of transformers' mask functions, in which the tokens of an
    image see each other; exactly as `plain` where the forward pass has no images."""
    images = ACTIVE.get()
    if images is None:
        return plain(mask_function=mask_function, **arguments)
    images.masks += 1
    # a cache of fixed size is longer than the row
    longest = arguments["kv_length"] + arguments["kv_offset"]
    missing = max(longest - images.numbers.shape[1], 0)
    numbers = F.pad(images.numbers, (0, missing), value=-1)
    # "causal" would otherwise be left to the attention, where there is no padding
    arguments["allow_is_causal_skip"] = False
    return plain(mask_function=or_masks(mask_function, same_image(numbers)), **arguments)


def same_image(numbers: Tensor) -> Callable[..., Tensor]:
    """Returns a mask function of transformers that is True within each image of `numbers`
    (B, T')."""

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_image = numbers[row, query]
        # text has -1 everywhere, which is no image
        return (query_image == numbers[row, key]) & (query_image >= 0)

    return mask
