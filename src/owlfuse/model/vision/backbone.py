"""N images, P patches (class token included where asked), Dv vision width, L levels beside the last
one, H and W the picture's size in pixels."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from owlfuse.core.errors import first_line
from owlfuse.model.parts import check_choice
from owlfuse.model.positions import sincos_2d_spread
from owlfuse.model.vision.base import Backbone, Preprocessing, Resize
from owlfuse.model.vision.batch_norm import allow_single_values
from owlfuse.model.vision.body import (
    all_differentiable,
    checkpoint_blocks,
    count_prefix_tokens,
    create_body,
    remove_modules,
    set_input_size,
    unused_parameters,
)

log = logging.getLogger(__name__)

Output = Literal["last", "penultimate"]
Norm = Literal["instance", "batch"]
Join = Literal["channel", "separate"]
LISTS = (nn.ModuleList, nn.Sequential)


class Measurement(NamedTuple):
    """What a pass of a timm model shows."""

    patches: int
    width: int
    grid: tuple[int, int]
    is_map: bool
    """Whether the features are a map of patches, and not a sequence of tokens."""
    unused: set[str]
    """The names of the parameters that they do not depend on."""


measurements: dict[Hashable, Measurement] = {}
"""Of the models that this process has built: a run builds its backbone on the meta device, where it
is checked, and again with weights, and a pass of a large one takes seconds."""


class TimmBackbone(Backbone):
    """Any timm model as a feature extractor: pixels (N, 3, H, W) -> features (N, P, Dv), or with
    separate levels (N, 1 + L, P, Dv).

    Width, token count, grid and preprocessing are read from the model. What the features do not use
    (classifier, pooling, the blocks after `penultimate`) is taken out, so that every parameter left
    has a gradient.

    Args:
        name: a name that `timm.create_model` knows, `hf-hub:` and `local-dir:` names included.
        pretrained: load timm's weights for the name.
        weights: a file of weights for the name instead, a path or `package:<package>/<path>` (see
            `backbone_weights`).
        output: `last`: what `forward_features` gives, after the last norm where the model has one
            there; `penultimate`: the last block but one, without the final norm, as mPLUG-Owl3
            reads SigLIP. For a hierarchical model a block is a stage.
        levels: further blocks whose outputs are features, too, counted from 0, or with negative
            numbers from the end. They are always before the model's final norm, and come from
            shallow to deep, whatever their order here.
        join: `channel`: the features of `output` and then those of the levels side by side, Dv
            being the sum of their widths (as of ViP-LLaVA, arXiv 2312.00784); `separate`:
            each by itself, for the fusion `deepstack`.
        class_token: keep the class (and register) tokens, first in the sequence, where the model
            has them.
        positions: add a fixed sin-cos table of the patches' places to the features: for
            convolutional backbones, which have no position embeddings of their own, and fusions
            that read an image's patches as a set.
        norm: a norm over the features, before the positions: from random weights a backbone gives
            nearly the same features for every picture and place, and the little that tells them
            apart is learned several times faster at unit size. `instance`: of each channel over
            the places of a picture; `batch`, as `true` in runs of before: over all pictures of the
            batch.
        image_size: side in pixels; by default that of the model's own data configuration.
        resize: what becomes of a picture's aspect ratio: `stretch`, `letterbox` or `crop` (see
            `Preprocessing`).
        kwargs: further keyword arguments of the timm model.
        chunk: images that pass the model at a time, for less memory: in training, activations of a
            chunk are dropped and computed again in the backward pass, unless the model is frozen.
            Features and gradients stay the same, but for what dropout draws. It is refused in
            training where batch norms are trained, because the statistics of a chunk are others
            than those of the batch, and where parameters are sharded, because ranks with other
            counts of images would gather them another number of times.
        gradient_checkpointing: activations inside of blocks are dropped and computed again in the
            backward pass.

    Raises:
        ValueError: an unknown name, a model whose features are no single map, a level that is not
            there or has another grid than the output, an instance norm over one place, a chunk
            below 1, or checkpointing of a model that has batch norms or does not support it.
    """

    COMPUTE_ONLY: ClassVar = ("chunk", "gradient_checkpointing")
    ORIGIN: ClassVar = ("pretrained", "weights")

    body: Any
    """timm's model."""

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        output: Output = "last",
        class_token: bool = True,
        positions: bool = False,
        norm: Norm | bool | None = None,
        image_size: int | None = None,
        kwargs: dict[str, Any] | None = None,
        chunk: int | None = None,
        gradient_checkpointing: bool = False,
        weights: str | None = None,
        levels: list[int] | None = None,
        join: Join = "channel",
        resize: Resize = "stretch",
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(
                f"chunk is {chunk}, expected a number of images of at least 1, or null for all at "
                "once"
            )
        check_choice("output", output, Output)
        check_choice("join", join, Join)
        self.chunk = chunk
        self.output = output
        # without a classifier, whose parameters would have no gradient
        self.body = create_body(name, pretrained, image_size, kwargs or {}, weights)
        self.prefix_tokens = count_prefix_tokens(self.body)
        self.drop_prefix = 0 if class_token else self.prefix_tokens
        self.preprocessing = preprocessing_of(self.body, image_size, resize)
        built_size = (kwargs or {}).get("img_size")
        # with image_size the model has been resampled from it
        is_other = built_size is not None and to_2tuple(built_size) != self.preprocessing.size
        if image_size is None and is_other:
            height, width = self.preprocessing.size
            raise ValueError(
                f"kwargs: img_size is {built_size}, and pictures are {height} x {width}; set "
                "image_size"
            )
        if output == "penultimate" and not hasattr(self.body, "forward_intermediates"):
            raise ValueError(
                f"timm's {name} gives no block's output but the last; choose output: last"
            )
        if join == "separate" and not levels:
            raise ValueError(
                "join: separate hands on levels one by one, and there are none; set levels"
            )
        self.levels = self.resolve_levels(name, levels) if levels else []
        self.extra_levels = len(self.levels) if join == "separate" else 0
        self.set_measured(name, self.measurement_key(name, kwargs))
        if positions and self.width % 4:
            raise ValueError(
                f"positions need a width divisible by 4, and that of {name} is {self.width}"
            )
        # each level has statistics of its own
        self.norm = feature_norm(norm, self.width * (1 + self.extra_levels))
        self.check_places()
        self.positions: Tensor | None
        # in no checkpoint: it follows from the size of the pictures, which may change
        self.register_buffer("positions", self.table() if positions else None, persistent=False)
        allow_single_values(self)
        self.set_checkpointing(gradient_checkpointing)

    def undecayed(self) -> list[nn.Parameter]:
        """Returns the parameters that timm's model names, as tables of positions."""
        if not hasattr(self.body, "no_weight_decay"):
            return []
        names = set(self.body.no_weight_decay())
        return [parameter for name, parameter in self.body.named_parameters() if name in names]

    def set_checkpointing(self, enable: bool) -> None:
        """Turns `gradient_checkpointing` on or off. Raises ValueError where the model cannot."""
        checkpoint_blocks(self.body, enable)

    def check_training(self, sharded: bool) -> None:
        """Raises ValueError for chunks of a model whose batch norms are trained, or whose
        parameters are split over ranks."""
        if self.chunk is None:
            return
        if sharded:
            raise ValueError(
                f"chunk is {self.chunk}, and parameters are split over ranks: those with other "
                "counts of images would wait for each other for ever; set model.vision.chunk=null"
            )
        if self.has_trained_norms():
            raise ValueError(
                f"chunk is {self.chunk}, and batch norms are trained, whose statistics are those "
                "of all images; set model.vision.chunk=null, or freeze the backbone"
            )

    def log_unlearned(self) -> None:
        """Logs that a norm over the features, whose statistics training learns, is frozen."""
        if isinstance(self.norm, _BatchNorm) and not self.norm.weight.requires_grad:
            log.warning(
                "model.vision.norm has no effect: its statistics are learned by training, and the "
                "part is frozen; set norm=null, or train the part in full"
            )

    def inner_model(self) -> nn.Module:
        """Returns timm's model."""
        return self.body

    def table(self) -> Tensor:
        """Returns the fixed table (P, Dv) of the patches' positions."""
        return sincos_2d_spread(self.grid, self.patches, self.width)

    def set_image_size(self, image_size: int) -> None:
        """Goes on at another size: learned position embeddings are resampled as timm does, fixed
        tables are recomputed.

        Raises:
            ValueError: a size that the patches do not divide, or at which the model's features are
                no longer as wide.
        """
        # timm resamples the position embeddings here
        set_input_size(self.body, type(self.body).__name__, image_size)
        size = (image_size, image_size)
        self.preprocessing = replace(self.preprocessing, size=size)
        width = self.width
        self.set_measured(type(self.body).__name__)
        self.check_places()
        if self.width != width:
            raise ValueError(
                f"image_size {image_size} gives features of width {self.width}, and they were "
                f"{width} wide"
            )
        if self.positions is not None:
            self.positions = self.table().to(self.positions)

    def check_places(self) -> None:
        """Raises ValueError for an instance norm over features of one place, which are all 0
        behind it."""
        if isinstance(self.norm, nn.InstanceNorm1d) and self.patches == 1:
            height, width = self.preprocessing.size
            raise ValueError(
                "norm: instance is over the places of a picture, and the backbone gives one at "
                f"{height} x {width} pixels; choose norm: null, or a larger image_size"
            )

    def resolve_levels(self, name: str, levels: list[int]) -> list[int]:
        """Returns the levels as numbers from 0, from shallow to deep.

        Raises:
            ValueError: one that the model does not have, the one of `output`, or one twice.
        """
        if not hasattr(self.body, "forward_intermediates"):
            raise ValueError(
                f"timm's {name} gives no block's output but the last; set levels: null"
            )
        probe: Any = copy.deepcopy(self.body).to("meta").eval()
        pixels = torch.zeros(1, 3, *self.preprocessing.size, device="meta")
        with torch.no_grad(), naming_size(name, self.preprocessing.size):
            # counted by a pass without memory, which knows stages as well as blocks
            count = len(probe.forward_intermediates(pixels, intermediates_only=True))
        # the block of the output itself is no further level
        last = count - 1 if self.output == "last" else count - 2
        resolved = sorted(level + count if level < 0 else level for level in levels)
        if resolved[0] < 0 or resolved[-1] >= last:
            raise ValueError(
                f"levels are {levels}, and timm's {name} has blocks 0 to {count - 1}, of which "
                f"output: {self.output} gives {last}; choose numbers below that, or from {-count} "
                f"to {last - count - 1}"
            )
        if len(set(resolved)) < len(resolved):
            raise ValueError(f"levels are {levels}, which name a block twice; leave one out")
        return resolved

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the features (N, P, Dv) of pixels (N, 3, H, W); (N, 1 + L, P, Dv) with separate
        levels."""
        if self.can_chunk(len(pixels)):
            features = self.chunked_features(pixels)
        else:
            features = self.sequence_features(pixels)
        if self.norm is not None:
            # a norm of channels is over the second dimension
            features = self.norm(features.transpose(1, 2)).transpose(1, 2)
        if self.extra_levels:
            features = features.unflatten(2, (1 + self.extra_levels, -1)).transpose(1, 2)
        return features if self.positions is None else features + self.positions.to(features.dtype)

    def can_chunk(self, images: int) -> bool:
        """Returns whether so many images are more than a chunk, and chunks do not change the
        result."""
        if self.chunk is None or images <= self.chunk:
            return False
        return not self.has_trained_norms()

    def has_trained_norms(self) -> bool:
        """Returns whether timm's model has batch norms that use the statistics of the pictures they
        see. Frozen ones use their running statistics, and the norm over the features comes behind
        the chunks."""
        return any(isinstance(m, _BatchNorm) and m.training for m in self.body.modules())

    def chunked_features(self, pixels: Tensor) -> Tensor:
        """Returns `sequence_features`, computed a chunk at a time."""
        # a frozen model keeps no activations that could be dropped
        trained = any(parameter.requires_grad for parameter in self.body.parameters())
        features = []
        for chunk in pixels.split(self.chunk):
            if trained and torch.is_grad_enabled():
                features.append(checkpoint(self.sequence_features, chunk, use_reentrant=False))
            else:
                features.append(self.sequence_features(chunk))
        return torch.cat(features)

    def sequence_features(self, pixels: Tensor) -> Tensor:
        """Returns the features (N, P, Dv) of pixels (N, 3, H, W), before norm and positions; all
        levels side by side, (N, P, (1 + L) Dv) where they are separate."""
        first, *levels = self.feature_maps(pixels)
        sequence = self.to_sequence(first, self.channels_last())
        if not levels:
            return sequence
        # intermediates have their channels first in every model
        sequences = [self.to_sequence(level, channels_last=False) for level in levels]
        return torch.cat([sequence, *sequences], dim=2)

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """Returns the features of `output`, then those of the levels, in timm's layout: (N, P, Dv),
        (N, Dv, h, w) or (N, h, w, Dv)."""
        if self.output == "last" and not self.levels:
            features = self.body.forward_features(pixels)
            if not isinstance(features, Tensor):
                raise ValueError(
                    f"{type(self.body).__name__} gives {type(features).__name__} as its features, "
                    "and one map is needed; choose output: penultimate or another model"
                )
            return [features]
        if self.output == "last":
            # all blocks are passed, and what comes out at the end is that of forward_features
            last, levels = self.intermediates(pixels, indices=self.levels)
            return [last, *map(with_prefix, levels)]
        # the last but one is behind all levels, and timm gives them in the order of the blocks
        *levels, penultimate = self.intermediates(
            pixels, indices=[*self.levels, -2], stop_early=True, intermediates_only=True
        )
        return [with_prefix(penultimate), *map(with_prefix, levels)]

    def intermediates(self, pixels: Tensor, **options: Any) -> Any:
        """Returns what timm's `forward_intermediates` gives, with the prefix tokens where the model
        has them, and without the final norm."""
        parameters = inspect.signature(self.body.forward_intermediates).parameters
        if self.prefix_tokens and "return_prefix_tokens" in parameters:
            # else timm leaves them out, and levels would have fewer tokens than the output
            options["return_prefix_tokens"] = True
        return self.body.forward_intermediates(pixels, norm=False, **options)

    def to_sequence(self, features: Tensor, channels_last: bool) -> Tensor:
        """Returns features of any of timm's layouts as (N, P, Dv), patches row by row."""
        if features.ndim == 3:
            return features[:, self.drop_prefix :]
        if channels_last:
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)

    def measurement_key(self, name: str, kwargs: dict[str, Any] | None) -> Hashable:
        """Returns all that what is measured depends on."""
        shapes = tuple((key, p.shape) for key, p in self.body.named_parameters())
        options = (self.output, tuple(self.levels), self.extra_levels, self.drop_prefix)
        return name, repr(kwargs), type(self.body), shapes, self.preprocessing.size, options

    def set_measured(self, name: str, key: Hashable = None) -> None:
        """Sets `patches`, `width` and `grid`, which timm states for few models and not for other
        sizes, and removes the modules that the features do not use.

        Args:
            name: timm's, for messages.
            key: under which the measurement is kept for the process's next model of that kind.

        Raises:
            ValueError: see `measure` and `check_tokens`.
        """
        measured = measurements.get(key)
        if measured is None:
            with naming_size(name, self.preprocessing.size):
                measured = self.measure()
            self.check_tokens(name, measured)
        if key is not None:
            measurements[key] = measured
        remove_modules(self.body, measured.unused)
        self.patches, self.width, self.grid = measured.patches, measured.width, measured.grid
        if measured.is_map:  # of patches alone
            self.prefix_tokens = self.drop_prefix = 0

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Returns what a forward pass of one picture shows.

        Raises:
            ValueError: a level that has another grid or other tokens than the output, or an output
                that leaves parameters of a module unused which it needs.
        """
        # in training a model may drop patches, see `check_tokens`
        training = self.training
        self.eval()
        probe: Any = all_differentiable(copy.deepcopy(self).to("meta"))
        with torch.enable_grad():
            # shapes and gradients alone: nothing is computed
            pixels = torch.zeros(1, 3, *self.preprocessing.size, device="meta")
            features, *levels = probe.feature_maps(pixels)
            probe.check_levels(features, levels, pixels)
            sequence = probe.sequence_features(pixels)
            unused = unused_parameters(probe.body, sequence)
            remove_modules(probe.body, unused)
        remaining = unused.intersection(name for name, _ in probe.body.named_parameters())
        if remaining:
            raise ValueError(
                f"output: {self.output} does not use {', '.join(sorted(remaining))}; choose the "
                "other output"
            )
        self.train(training)
        patches, width = sequence.shape[1:]
        # separate levels are side by side in this pass
        width //= 1 + self.extra_levels
        if features.ndim == 4:
            grid = tuple(features.shape[1:3] if self.channels_last() else features.shape[2:])
        else:
            grid = self.patch_grid(patches)
        return Measurement(patches, width, grid, features.ndim == 4, unused)

    def check_levels(self, output: Tensor, levels: list[Tensor], pixels: Tensor) -> None:
        """Checks that levels can stand beside the output.

        Raises:
            ValueError: another grid, other tokens, or for separate levels another width.
        """
        if levels and self.output == "last":
            features = self.body.forward_features(pixels)
            if not isinstance(features, Tensor) or features.shape != output.shape:
                raise ValueError(
                    f"{type(self.body).__name__} gives other features beside its levels than "
                    "alone; choose output: penultimate, or levels: null"
                )
        expected = self.to_sequence(output, self.channels_last()).shape[1:]
        for number, level in zip(self.levels, levels, strict=True):
            shape = self.to_sequence(level, channels_last=False).shape[1:]
            if shape[0] != expected[0]:
                raise ValueError(
                    f"levels: block {number} of {type(self.body).__name__} gives {shape[0]} "
                    f"patches, and output: {self.output} {expected[0]}; levels need the same grid"
                )
            if self.extra_levels and shape[1] != expected[1]:
                raise ValueError(
                    f"levels: block {number} of {type(self.body).__name__} is {shape[1]} wide, and "
                    f"output: {self.output} {expected[1]}; join: separate needs equal widths"
                )

    @torch.no_grad()
    def check_tokens(self, name: str, measured: Measurement) -> None:
        """Checks by a pass in training mode that there are as many tokens as in evaluation, and
        that patches can be distinguished from other tokens.

        Raises:
            ValueError: other tokens in training, no patches at all, or unknown tokens among them.
        """
        probe: Any = copy.deepcopy(self).to("meta").train()
        remove_modules(probe.body, measured.unused)
        # drop path draws random numbers in training mode
        with torch.random.fork_rng(devices=[]):
            pixels = torch.zeros(2, 3, *self.preprocessing.size, device="meta")
            features = probe.feature_maps(pixels)[0]
        tokens = probe.to_sequence(features, self.channels_last()).shape[1]
        if tokens != measured.patches:
            raise ValueError(
                f"timm's {name} gives {tokens} tokens in training and {measured.patches} in "
                "evaluation, where as many are needed; leave out what drops tokens "
                "(patch_drop_rate in kwargs)"
            )
        if measured.is_map:
            return
        patches = measured.patches - self.prefix_tokens + self.drop_prefix
        if patches <= 0:
            raise ValueError(
                f"timm's {name} gives class tokens alone, and patches are needed; choose output: "
                "penultimate or another model"
            )
        height, width = self.preprocessing.size
        # a grid of a square picture is square, so another count has unknown tokens in it
        if (
            self.drop_prefix == 0
            and not self.prefix_tokens
            and height == width
            and math.isqrt(patches) ** 2 != patches
        ):
            raise ValueError(
                f"timm's {name} gives {patches} tokens for a square picture and does not say "
                "which of them are patches; choose another model"
            )

    def channels_last(self) -> bool:
        """Returns whether a feature map is (N, h, w, Dv), as Swin's, whose intermediates are
        (N, Dv, h, w)."""
        return self.output == "last" and str(getattr(self.body, "output_fmt", "NCHW")).endswith(
            "NHWC"
        )

    def patch_grid(self, patches: int) -> tuple[int, int]:
        """Returns (h, w) of a ViT's patches; (1, P) where the tokens are no grid."""
        grid = getattr(getattr(self.body, "patch_embed", None), "grid_size", None)
        # a NaFlex ViT takes any size
        embeds: Any = getattr(self.body, "embeds", None)
        if grid is None and hasattr(embeds, "dynamic_feat_size"):
            grid = embeds.dynamic_feat_size(self.preprocessing.size)
        # P counts the prefix tokens unless they are dropped
        count = patches - self.prefix_tokens + self.drop_prefix
        return tuple(grid) if grid and grid[0] * grid[1] == count else (1, patches)

    def blocks(self) -> list[list[nn.Parameter]]:
        """Returns the parameters of the model's layers, first to last, in timm's own grouping; the
        norm is with the last. None where timm does not say what a layer is, as of MetaFormer."""
        if not hasattr(self.body, "group_matcher"):
            return []
        parameters = dict(self.body.named_parameters())
        matcher = self.body.group_matcher(coarse=False)
        groups = group_parameters(self.body, matcher, reverse=False)
        # timm makes a last group of those that its patterns do not name
        rest = {name for name in parameters if not is_named(name, matcher)}
        blocks = []
        for _, names in sorted(groups.items()):
            block = [parameters[name] for name in names if name in parameters and name not in rest]
            if block:
                blocks.append(block)
        # as a neck they are behind the last block, but frequencies of positions are in all
        blocks[-1] += [parameters[name] for name in sorted(rest) if "rope" not in name]
        if self.norm is not None:
            blocks[-1] += self.norm.parameters()
        return blocks

    def sharding_units(self) -> list[nn.Module]:
        """Returns timm's blocks or stages, where the model has a list of them."""
        units: list[nn.Module] = []
        for name, child in self.body.named_children():
            if name in ("blocks", "stages", "layers") and isinstance(child, LISTS):
                # a block at a time: what is gathered is freed before the next one
                units += child
        return units

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Inside, batch norms neither use nor move the batch's statistics: for the blank image
        of a batch without images."""
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.training]
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm in norms:
                norm.train()


def is_named(name: str, matcher: Any) -> bool:
    """Returns whether one of the patterns of a timm model's `group_matcher` names a parameter."""
    # a function names all
    if not isinstance(matcher, dict):
        return True
    for patterns in matcher.values():
        for entry in patterns if isinstance(patterns, list | tuple) else [patterns]:
            pattern = entry[0] if isinstance(entry, list | tuple) else entry
            if re.match(pattern, name):
                return True
    return False


def feature_norm(norm: Norm | bool | None, width: int) -> nn.Module | None:
    """Returns the norm over features (N, Dv, P), by the option of that name; None without one.

    Raises ValueError for an unknown one.
    """
    if norm is None or norm is False:
        return None
    if norm is True or norm == "batch":
        return nn.BatchNorm1d(width)
    check_choice("norm", norm, Norm)
    return nn.InstanceNorm1d(width, affine=True)


@contextmanager
def naming_size(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Raises ValueError that names a model and the pictures' size where timm's model, which may
    have one size alone, does not take it."""
    try:
        yield
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"timm's {name} does not take pictures of 3 channels and {size[0]} x {size[1]} pixels: "
            f"{first_line(error)[:160]}"
        ) from error


def with_prefix(features: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Returns an intermediate of timm, (N, Dv, h, w), or the patches of one behind its prefix
    tokens, (N, P, Dv)."""
    if isinstance(features, Tensor):
        return features
    patches, prefix = features
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def preprocessing_of(body: nn.Module, image_size: int | None, resize: Resize) -> Preprocessing:
    """Returns size, mean, std and interpolation of timm's data configuration for the model; with
    `image_size`, at that size."""
    data = resolve_model_data_config(body)
    size = (image_size, image_size) if image_size else tuple(data["input_size"][-2:])
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return Preprocessing(size, mean, std, data["interpolation"], resize)
