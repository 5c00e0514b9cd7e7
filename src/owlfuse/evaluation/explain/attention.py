"""The attention of an answer's tokens to the patches of the pictures.

N images (views of a tiled picture and frames of a video are one each), P patches, Dv vision width,
Q visual tokens per image, L tokens of the answer, S = N * Q visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseProcessor
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, VisualTokens
from owlfuse.data.media.tiles import best_grid
from owlfuse.evaluation.explain.capture import AttentionCapture, capture_attention
from owlfuse.evaluation.explain.overlays import side_by_side
from owlfuse.model.layouts import decoder_layers
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.vision.base import Backbone, Preprocessing


@torch.no_grad()
# compiled layers would keep the attention function that they were compiled with
@torch.compiler.set_stance("force_eager")
def attention_to_pictures(
    model: OwlfuseForConditionalGeneration,
    inputs: Any,
    answer_ids: Tensor,
    layers: list[int] | None = None,
) -> list[Tensor]:
    """Returns how much the answer read from each patch: one float32 map (h, w) per image on the
    CPU, over all images with sum 1.

    One forward pass over prompt and answer. Of each answer token it takes the weights at the
    position that predicts the token, the one before its own. They are the LLM's self-attention to
    the visual tokens where these stand among the text, or the attention to them that the fusion has
    put into the layers, times its gate (see `Fusion.visual_attention` and
    `Fusion.visual_attention_modules`), unscaled: a head or a layer that reads little from the
    pictures counts little. The mean over heads, layers and answer tokens then goes to the patches:
    a visual token of `linear` and `mlp` is its patch, and those of an abstractor are shared out by
    its `patch_shares`. The attention to class tokens and end tokens is left out, and the sum over
    patches is scaled to 1.

    The model is not changed.

    Args:
        inputs: the processor's output for one prompt with pictures.
        answer_ids: (L,) the ids that `generate` wrote behind the prompt. Ends of sequence behind
            the answer are left out.
        layers: of the LLM, from 0; by default all in which text attends to the pictures: every one,
            or those of hyperattention or cross-attention.

    Raises:
        DataError: no picture or answer, several prompts, another layer, patches that are no grid, a
            connector that does not say of which patches its tokens are made, or pictures out of
            reach of the LLM's sliding window.
    """
    prompt, pixels = inputs["input_ids"], inputs.get("pixel_values")
    if len(prompt) != 1:
        raise DataError(f"{len(prompt)} prompts are given, and one answer is explained at a time")
    if pixels is None:
        raise DataError("the prompt has no picture, so there is nothing that the answer looked at")
    answer = without_end(answer_ids, model.generation_config.eos_token_id)
    # the backbone runs once, and its features are needed for patch_shares
    with evaluating(model), features_of(model.model.vision) as features:
        visual = model.encode(prompt, pixels)
        # a prompt by itself has no padding, and may come without a mask
        mask = inputs.get("attention_mask")
        batch = model.batch(prompt, torch.ones_like(prompt) if mask is None else mask, visual)
        return maps_of(model.model, batch, visual, features[0], answer, layers)


def maps_of(
    model: MultimodalLM,
    batch: Batch,
    visual: VisualTokens,
    features: Tensor,
    answer: Tensor,
    layers: list[int] | None = None,
) -> list[Tensor]:
    """Returns the maps of `attention_to_pictures`, of a model without transformers' wrapper.

    Args:
        batch: one prompt.
        visual: its visual tokens.
        features: (N, P, Dv) of its images, or (N, 1 + L, P, Dv) of a backbone with extra levels.
        answer: (L,) ids.
    """
    if model.vision.extra_levels:
        # those that the visual tokens among the text are made of
        features = features[:, 0]
    grid, rows = grid_of(model.vision), len(answer)
    visual_layers = model.fusion.visual_attention_layers(len(decoder_layers(model.llm)))
    layers = select_layers(visual_layers, layers)
    # prompt and answer; nothing is predicted from the answer's last token
    input_ids = F.pad(batch.input_ids, (0, rows - 1))
    input_ids[0, batch.input_ids.shape[1] :] = answer[:-1].to(input_ids)
    placeholder = F.pad(batch.placeholder, (0, rows - 1))
    mask = F.pad(batch.attention_mask, (0, rows - 1), value=1)
    longer = replace(batch, input_ids=input_ids, attention_mask=mask, placeholder=placeholder)
    capture = AttentionCapture(model.fusion, placeholder[0], rows, layers)
    with capture_attention(model.llm, capture):
        # logits are not needed, and 0 would mean those of all positions
        model(longer, visual, logits_to_keep=1)
    if missing := [layer for layer in layers if layer not in capture.weights]:
        raise DataError(
            f"the attention of {type(model.llm).__name__} in layer {missing[0]} is no plain "
            "softmax of transformers' attention functions, so what it reads is not known; choose "
            "other layers"
        )
    # the mean over layers and answer tokens; heads are averaged already
    weights = torch.stack([capture.weights[layer] for layer in layers]).mean((0, 1))  # (S,)
    try:
        shares = model.connector.patch_shares(features).float()
    except ValueError as error:
        raise DataError(f"connector: {error}") from error
    # (N, P): tokens' weights go to the patches they are made of
    on_patches = torch.einsum("nq,nqp->np", weights.view(len(features), -1), shares)
    on_grid = on_patches[:, -grid[0] * grid[1] :].double().cpu()  # class tokens stand first
    if not on_grid.sum() > 0:
        raise DataError(
            "the answer read nothing from the pictures: they are further back than the LLM's "
            "attention reaches"
        )
    return list((on_grid / on_grid.sum()).float().unflatten(1, grid))


def explained(
    model: OwlfuseForConditionalGeneration,
    processor: OwlfuseProcessor,
    pictures: list[Image.Image],
    inputs: Any,
    answer_ids: Tensor,
    question: str,
) -> Image.Image:
    """Returns each picture beside the overlay of the answer's attention, with question, answer and
    a legend.

    Args:
        pictures: of the prompt, RGB.
        inputs, answer_ids: see `attention_to_pictures`, whose errors these are.
    """
    view_maps = attention_to_pictures(model, inputs, answer_ids)
    maps = picture_maps(processor, pictures, view_maps)
    answer = processor.tokenizer.decode(answer_ids.flatten(), skip_special_tokens=True).strip()
    return side_by_side(pictures, maps, question, answer)


def picture_maps(
    processor: OwlfuseProcessor, pictures: list[Image.Image], view_maps: list[Tensor]
) -> list[Tensor]:
    """Returns one map per picture: of a picture that the processor cut into tiles, its global
    view's and its tiles' added up on the tiles' grid (rows * h, columns * w). Sums stay, but for
    what lies on the bars of a letterbox. A map lies over all of its picture (see `over_picture`).
    """
    preprocessing = processor.image_processor.preprocessing()
    maps = []
    first = 0
    for picture in pictures:
        tiles = best_grid(picture.size, preprocessing.size) if processor.tile else None
        rows, columns = tiles or (0, 0)
        after = first + 1 + rows * columns
        maps.append(picture_map(view_maps[first:after], picture.size, preprocessing))
        first = after
    return maps


RASTER = 256
"""Cells on the longer side of a map that is moved onto its picture."""


def over_picture(
    map: Tensor, picture_size: tuple[int, int], preprocessing: Preprocessing
) -> Tensor:
    """Returns the map (h, w) of a view as one over the whole picture.

    A view that is all of the picture keeps its map. Else, of a picture with bars or one that was
    cropped, it is a finer map, in which the backbone's patches lie where they were on the picture:
    what was cut off is 0, and what lay on the bars is left out.

    Args:
        picture_size: (width, height).
    """
    if preprocessing.resize == "stretch":
        return map
    width, height = picture_size
    rows, columns = map.shape
    scale = RASTER / max(width, height)
    raster = max(1, round(height * scale)), max(1, round(width * scale))
    left, top, right, bottom = preprocessing.region(picture_size)
    # the patch under the middle of each cell, beyond the map where there is none
    y = (torch.arange(raster[0]) + 0.5) * height / raster[0]
    x = (torch.arange(raster[1]) + 0.5) * width / raster[1]
    row = ((y - top) / (bottom - top) * rows).floor().long()
    column = ((x - left) / (right - left) * columns).floor().long()
    row_inside = (row >= 0) & (row < rows)
    column_inside = (column >= 0) & (column < columns)
    inside = row_inside[:, None] & column_inside
    values = map[row.clamp(0, rows - 1)][:, column.clamp(0, columns - 1)]
    # a patch's weight is spread over the cells that it covers
    view_share = (right - left) * (bottom - top) / (width * height)
    cells = view_share * raster[0] * raster[1]
    return values * inside * (rows * columns / cells)


def picture_map(
    view_maps: list[Tensor], picture_size: tuple[int, int], preprocessing: Preprocessing
) -> Tensor:
    """Returns the maps (h, w) of a picture's global view and of its tiles, if it was cut into any,
    as one over the whole picture.

    Args:
        picture_size: (width, height).
    """
    joined, *tile_maps = view_maps
    tiles = best_grid(picture_size, preprocessing.size)
    if tile_maps and tiles:
        rows, columns = tiles
        # a patch of the global view covers rows * columns patches of tiles, which share its weight
        spread = joined.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        tile_rows = []
        for row in range(rows):
            tile_rows.append(torch.cat(tile_maps[row * columns :][:columns], dim=1))
        joined = spread / (rows * columns) + torch.cat(tile_rows)
    return over_picture(joined, picture_size, preprocessing)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode inside the block, and each module back into its mode
    afterwards: a wrapped model may be in training mode around parts that are not."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def features_of(vision: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the backbone's outputs inside the block, call by call."""
    features: list[Tensor] = []
    # a hook, since `encode` returns only what the connector made of them
    handle = vision.register_forward_hook(lambda module, args, out: features.append(out))
    try:
        yield features
    finally:
        handle.remove()


def grid_of(vision: Backbone) -> tuple[int, int]:
    """Returns (h, w) of the patches, without class tokens before them.

    Raises DataError where they are no rectangle.
    """
    rows, columns = vision.grid
    if rows == 1 and columns > 1:  # a backbone's grid for tokens that are none
        name = type(vision.inner_model()).__name__
        raise DataError(
            f"vision: timm does not tell that the {vision.patches} tokens of {name} are a "
            "rectangle of patches, row by row, so there is no map of them to lay over a picture; "
            "choose a backbone whose patches are"
        )
    return rows, columns


def select_layers(visual_layers: list[int], layers: list[int] | None) -> list[int]:
    """Returns the layers, by default all in which text attends to pictures.

    Raises DataError for another one.
    """
    if layers is None:
        return visual_layers
    if not layers or set(layers) - set(visual_layers):
        raise DataError(
            f"layers {layers}: text attends to pictures in {visual_layers}; choose of these"
        )
    return sorted(set(layers))


def without_end(answer_ids: Tensor, end: int | list[int] | None) -> Tensor:
    """Returns the ids (L,) without the ends of sequence behind them; of an answer that is nothing
    else, the first.

    Raises DataError for an answer without a token.
    """
    ids = answer_ids.flatten().tolist()
    if not ids:
        raise DataError("the answer has no token, so there is nothing to explain")
    ends = [end] if isinstance(end, int) else end or []
    # padding behind an answer is an end of sequence, too
    while len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return torch.tensor(ids)
