"""Inputs in the conventions of the released models, as batches of owlfuse.

N images, Q visual tokens per image, B rows, T text positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from owlfuse.artifacts.released.names import family_in
from owlfuse.core.types import Batch, image_starts
from owlfuse.model.loss import token_loss
from owlfuse.model.multimodal import MultimodalLM

OWL1_IMAGE, OWL2_IMAGE = -1, -200


@torch.no_grad()
def reference_logits(model: MultimodalLM, io: dict[str, Tensor]) -> Tensor:
    """Returns logits (B, T, V) for inputs in the convention of the model's family.

    Args:
        io: `input_ids` (B, T) and `images` (N, 3, H, W) in the order of their placeholders; of an
            `attention_mask` (B, T), or else of a `valid` (B, T), zeros are padding, on either side.
            mPLUG-Owl1: an image takes Q + 1 ids of -1, the last for the end token; images side by
            side make one longer run. mPLUG-Owl2: an image is one -200, which grows to Q + 1
            positions; the logits' T is that of the longest row then, and others are padded on the
            right. A row without an image may have an unused one in its place, as in the released
            code. mPLUG-Owl3: an image is one `image_token_id` of config.json. LLaVA: an image is Q
            of them, as its processor writes.
    """
    return model(released_batch(model, io))


@torch.no_grad()
def reference_loss(model: MultimodalLM, io: dict[str, Tensor]) -> Tensor:
    """Returns the mean cross-entropy of the next token, where `labels` (B, T) are not -100; an
    image is never supervised.

    The other inputs are those of `reference_logits`.
    """
    batch = released_batch(model, io)
    summed, count = token_loss(model(batch), batch.labels)
    return summed / count


def released_batch(model: MultimodalLM, io: dict[str, Tensor]) -> Batch:
    """Returns a batch of `reference_logits`' inputs."""
    family, per_image = family_in(model), model.fusion.tokens_per_image
    ids = io["input_ids"]
    mask = padding_mask(io)
    labels = io.get("labels", torch.full_like(ids, -100))
    is_image = ids == image_id(model, family)
    # their images have a token of the vocabulary, which padding may have, too
    if family in ("owl3", "llava"):
        is_image &= mask
    if family == "owl2":
        lengths = torch.where(is_image, per_image, 1)
        labels = repeat_positions(labels, lengths, -100)
        ids = repeat_positions(ids, lengths, 0)
        mask = repeat_positions(mask, lengths, 0)
        is_image = repeat_positions(is_image, lengths, 0)
    starts_by_row = [find_image_starts(row, per_image) for row in is_image.tolist()]
    images = io["images"]
    if family == "owl2":
        images = without_unused(images, starts_by_row)
    return Batch.of(
        ids.where(~is_image, ids.clamp_min(0)),  # an image's ids are negative, and no embedding's
        is_image,
        image_starts(starts_by_row, ids.shape[1]),
        pixel_values=make_pixels(model, images, sum(map(len, starts_by_row))),
        attention_mask=mask.long(),
        # the released code supervises no image
        labels=labels.masked_fill(is_image, -100),
    )


def image_id(model: MultimodalLM, family: str) -> int:
    """Returns the id that stands for an image."""
    if family not in ("owl3", "llava"):
        return OWL1_IMAGE if family == "owl1" else OWL2_IMAGE
    assert model.released is not None
    assert model.released.image_token_id is not None
    return model.released.image_token_id


def padding_mask(io: dict[str, Tensor]) -> Tensor:
    """(B, T) bool, True where a token is."""
    ids = io["input_ids"]
    for name in ("attention_mask", "valid"):
        if name in io and io[name].shape == ids.shape:
            return io[name].bool()
    return torch.ones_like(ids, dtype=torch.bool)


def repeat_positions(values: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Returns each of `values` (B, T) repeated `lengths` (B, T) times, rows padded on the right to
    the longest."""
    rows = [row.repeat_interleave(times) for row, times in zip(values, lengths)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def find_image_starts(is_image: list[bool], per_image: int) -> list[int]:
    """Returns where the images of a row begin; images side by side are one run."""
    starts = []
    run = 0
    for index, in_image in enumerate(is_image):
        if in_image and run % per_image == 0:
            starts.append(index)
        run = run + 1 if in_image else 0
    assert len(starts) * per_image == sum(is_image), "a run is no whole number of images"
    return starts


def without_unused(images: Tensor, starts_by_row: list[list[int]]) -> Tensor:
    """Returns the images without those that the released mPLUG-Owl2 code has for rows without
    any, where they are there."""
    used = []
    index = 0
    for starts in starts_by_row:
        used += range(index, index + len(starts))
        index += max(len(starts), 1)
    return images[used] if len(images) == index else images


def make_pixels(model: MultimodalLM, images: Tensor, placeholders: int) -> Tensor:
    """Returns the images that rows show, (N, 3, H, W) in the model's type, or a blank one."""
    assert len(images) == placeholders
    height, width = model.vision.preprocessing.size
    dtype = next(model.vision.parameters()).dtype
    if not placeholders:
        return torch.zeros(1, 3, height, width, dtype=dtype)
    # what is over, less than a patch, no released model reads either
    return images[..., :height, :width].to(dtype)
