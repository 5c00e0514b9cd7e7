"""Inputs in the conventions of the released models, as batches of owlfuse.

N images, Q visual tokens per image, E text positions that an image takes, B rows, T text positions,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from owlfuse.artifacts.released.names import family_in
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch
from owlfuse.model.loss import mean_loss
from owlfuse.model.multimodal import MultimodalLM

OWL1_IMAGE, OWL2_IMAGE = -1, -200


def reference_logits(model: MultimodalLM, io: dict[str, Tensor]) -> Tensor:
    """Logits (B, T, V) for inputs in the convention of the model's family.

    Args:
        io: `input_ids` (B, T) and `images` (N, 3, H, W) in the order of their placeholders; of an
            `attention_mask` (B, T), or else of a `valid` (B, T), zeros are padding, on either side.
            mPLUG-Owl1: an image takes Q + 1 ids of -1, the last for the end token; images side by
            side make one longer run. mPLUG-Owl2: an image is one -200, which grows to Q + 1
            positions; the logits' T is that of the longest row then, and others are padded on the
            right. A row without an image may have an unused one in its place, as in the released
            code. mPLUG-Owl3: an image is one `image_token_id` of config.json.

    Raises:
        DataError: more or fewer images than placeholders, with both numbers; a run of -1 that is no
            whole number of images; images of another size than the model's.
    """
    return logits_of(model, batch_of(model, io))


def reference_loss(model: MultimodalLM, io: dict[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the next token, where `labels` (B, T) are not -100; an image is
    never supervised.

    The other inputs are those of `reference_logits`.
    """
    batch = batch_of(model, io)
    logits = logits_of(model, batch)
    return mean_loss(logits, batch.labels)


@torch.no_grad()
def logits_of(model: MultimodalLM, batch: Batch) -> Tensor:
    """The model's logits on its own device."""
    return model(batch.to(next(model.parameters()).device))


def batch_of(model: MultimodalLM, io: dict[str, Tensor]) -> Batch:
    """A batch of `reference_logits`' inputs."""
    family, per_image = family_in(model), model.fusion.tokens_per_image
    ids, images = io["input_ids"], io.get("images")
    mask = padding_mask(io)
    labels = io.get("labels", torch.full_like(ids, -100))
    is_image = ids == image_id(model, family)
    if family == "owl3":
        is_image &= mask
    if family == "owl2":
        lengths = torch.where(is_image, per_image, 1)
        labels = grown(labels, lengths, -100)
        ids, mask, is_image = (grown(x, lengths, 0) for x in (ids, mask, is_image))
    positions = starts(is_image, per_image)
    counts = [len(row) for row in positions]
    pixels = images_of(model, family, images, counts)
    most = max(1, *counts)
    image_index = torch.full((len(ids), most), -1)
    image_positions = torch.full((len(ids), most), ids.shape[1])
    for row, found in enumerate(positions):
        image_index[row, : len(found)] = torch.arange(len(found)) + sum(counts[:row])
        image_positions[row, : len(found)] = torch.tensor(found, dtype=torch.long)
    has_images = sum(counts) > 0
    return Batch(
        input_ids=ids.where(~is_image, ids.clamp_min(0)),
        attention_mask=mask.long(),
        labels=labels.masked_fill(is_image, -100),
        placeholder=is_image,
        pixel_values=pixels,
        image_mask=torch.full((len(pixels),), has_images),
        image_index=image_index,
        image_positions=image_positions,
        has_images=has_images,
    )


def image_id(model: MultimodalLM, family: str) -> int:
    """The id that stands for an image.

    Raises DataError where mPLUG-Owl3's config.json does not say it.
    """
    if family != "owl3":
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


def grown(values: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Each of `values` (B, T) repeated `lengths` (B, T) times, rows padded on the right to the
    longest."""
    rows = [row.repeat_interleave(times) for row, times in zip(values, lengths)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def starts(is_image: Tensor, per_image: int) -> list[list[int]]:
    """For each row of (B, T) bool, where its images begin.

    Raises DataError for a run that is no whole number of images.
    """
    found = []
    for number, row in enumerate(is_image.tolist()):
        begun: list[int] = []
        run = 0
        for index, here in enumerate([*row, False]):
            if here:
                if run % per_image == 0:
                    begun.append(index)
                run += 1
            elif run % per_image:
                raise DataError(
                    f"input_ids row {number} has a run of {run} image positions, and an image "
                    f"takes {per_image}"
                )
            else:
                run = 0
        found.append(begun)
    return found


def images_of(model: MultimodalLM, family: str, images: Tensor | None, counts: list[int]) -> Tensor:
    """The images that rows show, (N, 3, H, W) in the model's type, or a blank one.

    Raises DataError for another number.
    """
    wanted, given = sum(counts), 0 if images is None else len(images)
    unused = [
        sum(max(c, 1) for c in counts[:row]) for row, count in enumerate(counts) if count == 0
    ]
    if images is not None and family == "owl2" and unused and given == wanted + len(unused):
        images = images[[n for n in range(given) if n not in unused]]
    elif given != wanted:
        extra = (
            f" (or {wanted + len(unused)}, one unused for each row of text alone)"
            if family == "owl2" and unused
            else ""
        )
        raise DataError(
            f"input_ids have {wanted} image placeholders, and there are {given} images; give "
            f"{wanted}{extra}"
        )
    height, width = model.vision.preprocessing.size
    weight = next(model.vision.parameters())
    if images is None or not wanted:
        return torch.zeros(1, 3, height, width, dtype=weight.dtype)
    patch = model.vision.body.patch_embed.patch_size[0]
    if not (0 <= images.shape[2] - height < patch and 0 <= images.shape[3] - width < patch):
        raise DataError(
            f"images are {tuple(images.shape[2:])} pixels, and the model takes {(height, width)}; "
            "resize them"
        )
    # what is over, less than a patch, no released model reads either
    return images[..., :height, :width].to(weight.dtype)
