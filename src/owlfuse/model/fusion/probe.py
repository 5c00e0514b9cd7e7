"""B rows, T text positions, Q visual tokens per image, D LLM width, V vocabulary.

Probes of a fusion on a tiny copy of the LLM that it is attached to (see `owlfuse.model.llm_probe`).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from owlfuse.core.errors import error_summary
from owlfuse.core.types import Batch, VisualTokens, image_starts
from owlfuse.model.fusion.base import Fusion, fused_output
from owlfuse.model.layouts import check_needs, decoder_layers
from owlfuse.model.llm import FAILURES, width
from owlfuse.model.llm_probe import (
    check_cache,
    configuration_key,
    plain_cpu,
    randomize,
    same,
    tiny_copy,
)

VISUAL_TOKENS = 3
"""Q of the probe."""
TEXT, IMAGE_ROW = [11, 12, 13, 14], [[21, 22], [23, 24, 25], [26, 27]]
"""A row without an image, and the texts around the images of another."""
MIN_CHANGE = 1e-5
"""Relative to the largest logit: a smaller change is rounding."""
results: dict[Any, str | None] = {}


def check_fusion(fusion: Fusion, llm: PreTrainedModel) -> None:
    """Checks a fusion that is not attached yet, once for each configuration: a row without images
    has the logits of the plain LLM, with padding on either side, and a picture changes logits
    behind it and none before it.

    Raises:
        ValueError: one of these does not hold for the LLM's class.
    """
    count = len(decoder_layers(llm))
    layer_indices = []
    for index in fusion.visual_attention_layers(count):
        # `attach` refuses layers that the LLM does not have
        if 0 <= index < count:
            layer_indices.append(index)
    check_needs(llm, fusion.needs, type(fusion).__name__, layer_indices)
    check_cache(llm)
    # those with an underscore are torch's own: modules, hooks and parameters
    arguments = {name: value for name, value in vars(fusion).items() if not name.startswith("_")}
    # all that a result depends on
    key = type(fusion), repr(fusion), repr(arguments), *configuration_key(llm)
    if key not in results:
        # the caller's own is attached to the real LLM
        attached = copy.deepcopy(fusion)
        with plain_cpu():
            results[key] = find_failure(attached, tiny_copy(llm))
    if failure := results[key]:
        raise ValueError(
            f"{type(fusion).__name__} does not work with {type(llm).__name__}: {failure}"
        )


def find_failure(fusion: Fusion, llm: PreTrainedModel) -> str | None:
    """Returns which check of `check_fusion` fails, None where all hold."""
    try:
        alone = llm(
            input_ids=torch.tensor([TEXT]), attention_mask=torch.ones(1, len(TEXT)), use_cache=False
        ).logits[0]
    except FAILURES as error:
        return f"a forward pass of the LLM fails ({error_summary(error)})"
    # few, so that rows stay short
    fusion.set_connector_tokens(VISUAL_TOKENS)
    try:
        fusion.attach(llm)
    except ValueError:
        # a refusal of the fusion's own
        raise
    except FAILURES as error:
        return f"it cannot be attached ({error_summary(error)})"
    # Mllama leaves out layers where a row has none of its own images
    layers = list(decoder_layers(llm))
    skipped = set(fusion.visual_attention_modules(llm))
    for index in skipped:
        layers[index].register_forward_hook(lambda *_, index=index: skipped.discard(index))
    fusion.eval()
    # the same pictures in every process, so that all ranks come to the same result
    images = torch.randn(2, VISUAL_TOKENS, width(llm), generator=torch.Generator().manual_seed(1))
    try:
        padded = {}
        for padding_side in ("right", "left"):
            padded[padding_side] = text_logits(fusion, llm, images, padding_side)
        for module in (fusion, *fusion.owned(llm)):  # a gate may begin closed
            randomize(module)
        batch, visual = make_rows(fusion, images, "right")
        changed = replace(visual, tokens=torch.stack([images[0], -images[1]]))
        differences = relative_changes(fusion, llm, batch, visual, changed)
    except FAILURES as error:
        return f"a forward pass with a picture fails ({error_summary(error)})"
    if skipped:
        return f"its layers {sorted(skipped)} are not computed without images of its own"
    for padding_side, logits in padded.items():
        if not same(logits, alone):
            return (
                f"a row without pictures, padded on the {padding_side}, has other logits than in "
                "the plain LLM"
            )
    # the prediction of a placeholder itself may depend on the picture, too
    behind = torch.arange(len(differences)) >= batch.image_positions[1, 1]
    if not torch.isfinite(differences).all():
        return "logits are not finite"
    if differences[~behind].max() > MIN_CHANGE:
        return "a picture changes logits of the text before it"
    if differences[behind].max() <= MIN_CHANGE:
        return "pictures do not change the logits of the text behind them"
    if visual.levels is not None:
        changed = replace(visual, levels=visual.levels * torch.tensor([1.0, -1.0])[:, None, None])
        differences = relative_changes(fusion, llm, batch, visual, changed)
        if differences[behind].max() <= MIN_CHANGE:
            return (
                "the backbone's extra levels do not change the logits of the text behind a picture"
            )
    return None


def text_logits(fusion: Fusion, llm: PreTrainedModel, images: Tensor, padding_side: str) -> Tensor:
    """Returns logits (T, V) of TEXT in a batch whose second row has images."""
    batch, visual = make_rows(fusion, images, padding_side)
    logits = fused_output(llm, fusion, batch, visual).logits
    return logits[0][batch.attention_mask[0].bool()]


def relative_changes(
    fusion: Fusion, llm: PreTrainedModel, batch: Batch, visual: VisualTokens, changed: VisualTokens
) -> Tensor:
    """Returns how much each position's logits of the row of images change with other visual tokens,
    relative to the largest logit, (T,)."""
    logits = fused_output(llm, fusion, batch, visual).logits[1]
    changed_logits = fused_output(llm, fusion, batch, changed).logits[1]
    return (logits - changed_logits).abs().amax(-1) / logits.abs().max()


def make_rows(fusion: Fusion, images: Tensor, padding_side: str) -> tuple[Batch, VisualTokens]:
    """Returns a batch of two rows: TEXT, and IMAGE_ROW with an image between its texts."""
    per_image = fusion.tokens_per_image
    ids: list[int] = []
    in_image: list[bool] = []
    starts: list[int] = []
    for index, text in enumerate(IMAGE_ROW):
        if index:
            starts.append(len(ids))
            ids += [1] * per_image
            in_image += [True] * per_image
        ids += text
        in_image += [False] * len(text)
    length = len(ids)
    first = 0 if padding_side == "right" else length - len(TEXT)
    input_ids = torch.ones(2, length, dtype=torch.long)
    mask = torch.zeros(2, length, dtype=torch.long)
    placeholder = torch.zeros(2, length, dtype=torch.bool)
    input_ids[0, first : first + len(TEXT)] = torch.tensor(TEXT)
    mask[0, first : first + len(TEXT)] = 1
    input_ids[1], mask[1], placeholder[1] = torch.tensor(ids), 1, torch.tensor(in_image)
    batch = Batch.of(
        input_ids,
        placeholder,
        image_starts([[], starts], length),
        attention_mask=mask,
        visual_count=int(placeholder.sum()),
    )
    levels = images.expand(fusion.levels, *images.shape) if fusion.levels else None
    return batch, VisualTokens(images, batch.image_index, batch.image_positions, levels)
