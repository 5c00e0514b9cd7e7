"""Inputs in the conventions of the released models, as batches of owlfuse.

N images, Q visual tokens per image, E text positions that an image takes, B rows, T text positions,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from owlfuse.artifacts.released.names import family_in
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, image_starts
from owlfuse.model.loss import mean_loss
from owlfuse.model.multimodal import MultimodalLM

OWL1_IMAGE, OWL2_IMAGE = -1, -200


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

    Raises:
        DataError: more or fewer images than placeholders, with both numbers; a run of -1 that is no
            whole number of images; images of another size than the model's.
    """
    return compute_logits(model, make_batch(model, io))


def reference_loss(model: MultimodalLM, io: dict[str, Tensor]) -> Tensor:
    """Returns the mean cross-entropy of the next token, where `labels` (B, T) are not -100; an
    image is never supervised.

    The other inputs are those of `reference_logits`.
    """
    batch = make_batch(model, io)
    return mean_loss(compute_logits(model, batch), batch.labels)


@torch.no_grad()
def compute_logits(model: MultimodalLM, batch: Batch) -> Tensor:
    """Returns the model's logits, on its own device."""
    return model(batch.to(next(model.parameters()).device))


def make_batch(model: MultimodalLM, io: dict[str, Tensor]) -> Batch:
    """Returns a batch of `reference_logits`' inputs."""
    family, per_image = family_in(model), model.fusion.tokens_per_image
    ids, images = io["input_ids"], io.get("images")
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
    starts_by_row = find_image_starts(is_image, per_image)
    counts = [len(starts) for starts in starts_by_row]
    pixels = make_pixels(model, family, images, counts)
    return Batch.of(
        ids.where(~is_image, ids.clamp_min(0)),  # an image's ids are negative, and no embedding's
        is_image,
        image_starts(starts_by_row, ids.shape[1]),
        pixel_values=pixels,
        attention_mask=mask.long(),
        # the released code supervises no image
        labels=labels.masked_fill(is_image, -100),
    )


def image_id(model: MultimodalLM, family: str) -> int:
    """Returns the id that stands for an image.

    Raises DataError where config.json should say it and does not.
    """
    if family not in ("owl3", "llava"):
        return OWL1_IMAGE if family == "owl1" else OWL2_IMAGE
    released = model.released
    if released is None or released.image_token_id is None:
        raise DataError(
            "config.json of the released folder has no image_token_id; set "
            "model.released.image_token_id"
        )
    return released.image_token_id


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


def find_image_starts(is_image: Tensor, per_image: int) -> list[list[int]]:
    """Returns for each row of (B, T) bool where its images begin.

    Raises DataError for a run that is no whole number of images.
    """
    starts_by_row = []
    for number, row in enumerate(is_image.tolist()):
        starts: list[int] = []
        run = 0
        # one more position, which ends a run at the row's end
        for index, in_image in enumerate([*row, False]):
            if in_image:
                if run % per_image == 0:
                    starts.append(index)
                run += 1
            elif run % per_image:
                raise DataError(
                    f"input_ids row {number} has a run of {run} image positions, and an image "
                    f"takes {per_image}"
                )
            else:
                run = 0
        starts_by_row.append(starts)
    return starts_by_row


def make_pixels(
    model: MultimodalLM,
    family: str,
    images: Tensor | None,
    counts: list[int],
) -> Tensor:
    """Returns the images that rows show, (N, 3, H, W) in the model's type, or a blank one.

    Raises DataError for another number.
    """
    placeholders, available = sum(counts), 0 if images is None else len(images)
    unused = unused_images(counts) if family == "owl2" else []
    if images is not None and unused and available == placeholders + len(unused):
        images = images[[n for n in range(available) if n not in unused]]
    elif available != placeholders:
        alternative = ""
        if unused:
            with_unused = placeholders + len(unused)
            alternative = f" (or {with_unused}, one unused for each row of text alone)"
        raise DataError(
            f"input_ids have {placeholders} image placeholders, and there are {available} images; "
            f"give {placeholders}{alternative}"
        )
    height, width = model.vision.preprocessing.size
    weight = next(model.vision.parameters())
    if images is None or not placeholders:
        return torch.zeros(1, 3, height, width, dtype=weight.dtype)
    body: Any = model.vision.inner_model()
    patch = body.patch_embed.patch_size[0]
    if not (0 <= images.shape[2] - height < patch and 0 <= images.shape[3] - width < patch):
        raise DataError(
            f"images are {tuple(images.shape[2:])} pixels, and the model takes {(height, width)}; "
            "resize them"
        )
    # what is over, less than a patch, no released model reads either
    return images[..., :height, :width].to(weight.dtype)


def unused_images(counts: list[int]) -> list[int]:
    """Returns the indices of the images that the released mPLUG-Owl2 code has for rows without any.

    Args:
        counts: of each row's images.
    """
    unused = []
    index = 0
    for count in counts:
        if count == 0:
            unused.append(index)
        index += max(count, 1)
    return unused
