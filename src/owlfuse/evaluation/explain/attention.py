"""Where an answer looked: the attention from its tokens to the patches of the pictures.

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
from owlfuse.artifacts.hf.processing import OwlfuseProcessor, flat
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, VisualTokens
from owlfuse.data.media.images import to_rgb
from owlfuse.data.media.tiles import best_grid
from owlfuse.evaluation.explain.notes import Notes, noting
from owlfuse.evaluation.explain.overlays import side_by_side
from owlfuse.model.llm import decoder_layers
from owlfuse.model.multimodal import MultimodalLM


@torch.no_grad()
# compiled layers would keep the attention function that they were compiled with
@torch.compiler.set_stance("force_eager")
def attention_to_pictures(
    model: OwlfuseForConditionalGeneration,
    inputs: Any,
    answer_ids: Tensor,
    layers: list[int] | None = None,
) -> list[Tensor]:
    """How much the answer read from each patch: one float32 map (h, w) per image on the CPU, over
    all images with sum 1.

    One forward pass over prompt and answer. Of each answer token it takes the weights at the
    position from which the token was told, the one before its own: there the model looked for it.
    They are the LLM's self-attention to the visual tokens (`concat`, `modality_adaptive`), or
    hyperattention's to them, times its gate (see `Fusion.looks`), as they are: a head or a layer
    that reads little from the pictures counts little. The mean over heads, layers and answer tokens
    then goes to the patches: a visual token of `linear` and `mlp` is its patch, and those of an
    abstractor are shared out by its `patch_shares`. What falls on class tokens and end tokens is
    left out, and the rest is scaled to sum 1.

    The model is left as it was.

    Args:
        inputs: what the processor gave for one prompt with pictures.
        answer_ids: (L,) what `generate` gave behind the prompt. Ends of sequence behind the answer
            are left out.
        layers: of the LLM, from 0; by default all in which text attends to the pictures: every one,
            or those of hyperattention.

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
    with evaluating(model), features_of(model.model.vision) as features:
        visual = model.encode(prompt, pixels)
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
    """See `attention_to_pictures`.

    Args:
        batch: one prompt.
        visual: its visual tokens.
        features: (N, P, Dv) of its images.
        answer: (L,) ids.
    """
    grid, rows = grid_of(model.vision), len(answer)
    chosen = chosen_layers(model.fusion.looking_layers(len(decoder_layers(model.llm))), layers)
    told = F.pad(batch.input_ids, (0, rows - 1))
    told[0, batch.input_ids.shape[1] :] = answer[:-1].to(told)
    placeholder = F.pad(batch.placeholder, (0, rows - 1))
    mask = F.pad(batch.attention_mask, (0, rows - 1), value=1)
    longer = replace(batch, input_ids=told, attention_mask=mask, placeholder=placeholder)
    notes = Notes(model.fusion, placeholder[0], rows, chosen)
    with noting(model.llm, notes):
        model(longer, visual, logits_to_keep=1)
    weights = torch.stack([notes.found[layer] for layer in chosen]).mean((0, 1))  # (S,)
    shares = patch_shares(model.connector, features).float()
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
    pictures: list[Any],
    inputs: Any,
    answer_ids: Tensor,
    question: str,
    layers: list[int] | None = None,
) -> Image.Image:
    """Each picture beside the overlay of where the answer looked, with question, answer and a
    legend.

    Args:
        pictures: of the prompt, as the processor took them.
        inputs, answer_ids, layers: see `attention_to_pictures`, whose errors these are.
    """
    pictures = [to_rgb(picture) for picture in flat(pictures)]
    maps = whole_maps(processor, pictures, attention_to_pictures(model, inputs, answer_ids, layers))
    answer = processor.tokenizer.decode(answer_ids.flatten(), skip_special_tokens=True).strip()
    return side_by_side(pictures, maps, question, answer)


def whole_maps(
    processor: OwlfuseProcessor, pictures: list[Image.Image], maps: list[Tensor]
) -> list[Tensor]:
    """One map per picture: of a picture that the processor cut into tiles, its global view's and
    its tiles' added up on the tiles' grid (rows * h, columns * w). Sums stay. Pictures are resized
    as a whole, never cropped, so a map lies over all of its picture.
    """
    rest = iter(maps)
    view = processor.image_processor.size["height"], processor.image_processor.size["width"]
    tiles = [
        (best_grid(picture.size, view) if processor.tile else None) or (0, 0)
        for picture in pictures
    ]
    return [
        whole_map([next(rest) for _ in range(1 + rows * columns)], (rows, columns))
        for rows, columns in tiles
    ]


def whole_map(views: list[Tensor], tiles: tuple[int, int] | None) -> Tensor:
    """The maps (h, w) of a picture's global view and of its (rows, columns) of tiles, if it was
    cut into any, as one."""
    if tiles is None or len(views) == 1:
        return views[0]
    (rows, columns), (seen, *cut) = tiles, views
    spread = seen.repeat_interleave(rows, 0).repeat_interleave(columns, 1) / (rows * columns)
    return spread + torch.cat(
        [torch.cat(cut[row * columns :][:columns], dim=1) for row in range(rows)]
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards each of its modules is in its own again,
    since a wrapped model may be in training mode around parts that are not."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def features_of(vision: nn.Module) -> Iterator[list[Tensor]]:
    """What the backbone gives inside, call by call."""
    features: list[Tensor] = []
    handle = vision.register_forward_hook(lambda module, args, out: features.append(out))
    try:
        yield features
    finally:
        handle.remove()


def patch_shares(connector: Any, features: Tensor) -> Tensor:
    """(N, Q, P) of which patches each visual token is made."""
    if hasattr(connector, "patch_shares"):
        return connector.patch_shares(features)
    patches = features.shape[1]
    if connector.tokens != patches:
        raise DataError(
            f"connector: {type(connector).__name__} makes {connector.tokens} tokens of {patches} "
            "patches, and has no "
            "patch_shares that says of which; see owlfuse.model.connectors"
        )
    return torch.eye(patches, device=features.device).expand(len(features), -1, -1)


def grid_of(vision: Any) -> tuple[int, int]:
    """(h, w) of the patches, class tokens before them apart.

    Raises DataError where they are no rectangle.
    """
    rows, columns = vision.grid
    if rows == 1 and columns > 1:  # what a backbone says of tokens that are no grid
        name = type(getattr(vision, "body", vision)).__name__
        raise DataError(
            f"vision: timm does not tell that the {vision.patches} tokens of {name} are a "
            "rectangle of patches, row by row, so "
            "there is no map of them to lay over a picture; choose a backbone whose patches are"
        )
    return rows, columns


def chosen_layers(looking: list[int], asked: list[int] | None) -> list[int]:
    """The layers asked for, or all of them.

    Raises DataError for one in which text attends to no picture.
    """
    if asked is None:
        return looking
    if not asked or set(asked) - set(looking):
        raise DataError(f"layers {asked}: text attends to pictures in {looking}; choose of these")
    return sorted(set(asked))


def without_end(answer_ids: Tensor, end: int | list[int] | None) -> Tensor:
    """(L,) without the ends of sequence behind it; of an answer that is nothing else, the first.

    Raises DataError for none.
    """
    ids = answer_ids.flatten().tolist()
    if not ids:
        raise DataError("the answer has no token, so there is nothing to explain")
    ends = [end] if isinstance(end, int) else end or []
    while len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return torch.tensor(ids)
