"""B rows, T text positions, Q visual tokens per image, D LLM width, V vocabulary.

What a fusion promises, tried on a tiny copy of the LLM that it is to be attached to (see
`owlfuse.model.llm_probe`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from owlfuse.core.types import Batch, VisualTokens, image_starts
from owlfuse.model.fusion.base import Fusion, fused_logits
from owlfuse.model.llm import FAILURES, first_line, width
from owlfuse.model.llm_probe import aside, configuration_key, fill, same, tiny_copy

VISUAL_TOKENS = 3
"""Q of the probe."""
TEXT, IMAGE_ROW = [11, 12, 13, 14], [[21, 22], [23, 24, 25], [26, 27]]
"""A row without an image, and the texts around the images of another."""
VISIBLE = 1e-5
"""Of the largest logit: a change that is no rounding."""
results: dict[Any, str | None] = {}


def check_fusion(fusion: Fusion, llm: PreTrainedModel) -> None:
    """Tries a fusion that is not attached yet, once for each configuration: a row without images
    has the logits of the plain LLM, with padding on either side, and a picture changes logits
    behind it and none before it.

    Raises:
        ValueError: the LLM's class, and what does not hold.
    """
    arguments = {name: value for name, value in vars(fusion).items() if not name.startswith("_")}
    key = type(fusion), repr(fusion), repr(arguments), *configuration_key(llm)
    if key not in results:
        attached = copy.deepcopy(fusion)
        with aside():
            results[key] = broken_promise(attached, tiny_copy(llm))
    if broken := results[key]:
        raise ValueError(
            f"{type(fusion).__name__} does not work with {type(llm).__name__}: {broken}"
        )


def broken_promise(fusion: Fusion, llm: PreTrainedModel) -> str | None:
    """What of `check_fusion` does not hold, None where all does."""
    try:
        alone = llm(
            input_ids=torch.tensor([TEXT]), attention_mask=torch.ones(1, len(TEXT)), use_cache=False
        ).logits[0]
    except FAILURES as error:
        return f"a forward pass of the LLM fails ({first_line(error)})"
    fusion.set_connector_tokens(VISUAL_TOKENS)
    fusion.attach(llm)
    fusion.eval()
    images = torch.randn(2, VISUAL_TOKENS, width(llm), generator=torch.Generator().manual_seed(1))
    try:
        text_rows = {side: text_logits(fusion, llm, images, side) for side in ("right", "left")}
        for module in (fusion, *fusion.owned(llm)):  # a gate may begin closed
            fill(module)
        differences, behind = changes(fusion, llm, images)
    except FAILURES as error:
        return f"a forward pass with a picture fails ({first_line(error)})"
    for side, logits in text_rows.items():
        if not same(logits, alone):
            return (
                f"a row without pictures, padded on the {side}, has other logits than in the "
                "plain LLM"
            )
    if not torch.isfinite(differences).all():
        return "logits are not finite"
    if differences[~behind].max() > VISIBLE:
        return "a picture changes logits of the text before it"
    if differences[behind].max() <= VISIBLE:
        return "pictures do not change the logits of the text behind them"
    return None


def text_logits(fusion: Fusion, llm: PreTrainedModel, images: Tensor, side: str) -> Tensor:
    """Logits (T, V) of TEXT in a batch whose other row has images."""
    batch, visual = rows(fusion, images, side)
    return fused_logits(llm, fusion, batch, visual)[0][batch.attention_mask[0].bool()]


def changes(fusion: Fusion, llm: PreTrainedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """How much each position's logits change with the second picture of the row of images, relative
    to the largest logit; and which positions are behind the picture's placeholders. (T,) each."""
    batch, visual = rows(fusion, images, "right")
    other = torch.stack([images[0], -images[1]])
    logits = [
        fused_logits(
            llm, fusion, batch, VisualTokens(tokens, visual.image_index, visual.image_positions)
        )[1]
        for tokens in (visual.tokens, other)
    ]
    differences = (logits[0] - logits[1]).abs().amax(-1) / logits[0].abs().max()
    begins = batch.image_positions[1, 1]
    here = torch.arange(len(differences))
    # what a placeholder itself predicts counts as behind: it may hold the picture
    return differences, here >= begins


def rows(fusion: Fusion, images: Tensor, side: str) -> tuple[Batch, VisualTokens]:
    """A batch of two rows: TEXT, and IMAGE_ROW with an image between its texts."""
    per_image = fusion.tokens_per_image
    ids: list[int] = []
    holds: list[bool] = []
    starts: list[int] = []
    for index, text in enumerate(IMAGE_ROW):
        if index:
            starts.append(len(ids))
            ids += [1] * per_image
            holds += [True] * per_image
        ids += text
        holds += [False] * len(text)
    length = len(ids)
    first = 0 if side == "right" else length - len(TEXT)
    input_ids = torch.ones(2, length, dtype=torch.long)
    mask = torch.zeros(2, length, dtype=torch.long)
    placeholder = torch.zeros(2, length, dtype=torch.bool)
    input_ids[0, first : first + len(TEXT)] = torch.tensor(TEXT)
    mask[0, first : first + len(TEXT)] = 1
    input_ids[1], mask[1], placeholder[1] = torch.tensor(ids), 1, torch.tensor(holds)
    batch = Batch.of(
        input_ids,
        placeholder,
        image_starts([[], starts], length),
        attention_mask=mask,
        visual_count=int(placeholder.sum()),
    )
    return batch, VisualTokens(images, batch.image_index, batch.image_positions)
