"""N images, P patches, (h, w) their grid, Dv vision width, H and W the picture's size in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from hydra.utils import get_object
from torch import Tensor, nn
from torch.nn import functional as F

from owlfuse.model.parts import check_choice, named_errors
from owlfuse.model.vision.backbone import TimmBackbone
from owlfuse.model.vision.base import Backbone, Preprocessing, Resize

Align = Literal["interpolate", "refuse"]
SHARED = ("class_token", "join", "chunk", "gradient_checkpointing", "resize")
"""Arguments of `TimmBackbone` that are decided for all backbones together."""


class MultiBackbone(Backbone):
    """Several timm backbones that see the same picture, their patches on one grid and joined by
    channel: Dv is the sum of their widths. With DINOv2 and SigLIP the vision of Prismatic (arXiv
    2402.07865, section 4.2).

    Pictures are made into pixels once, as the first backbone was trained; for each other one they
    are brought to its own mean and standard deviation, (x * std_1 + mean_1 - mean_k) / std_k, and
    where its pictures are smaller, averaged down (bicubic, with antialiasing). Class and register
    tokens are left out.

    The adapter `last_n` trains the last n blocks of each backbone.

    Args:
        backbones: nodes of `TimmBackbone` by name, two or more; the first one's grid is everyone's.
            Each has its own weights, `output`, `levels` (by channel), `norm`, `positions` and
            `kwargs`.
        align: where another backbone's grid is not the first one's: `interpolate` its features
            bilinearly, as Cambrian-1 (arXiv 2406.16860, section 3.2), or `refuse` it.
        image_size: side in pixels for all of them, in place of their own; null: each has its own,
            and pictures come at the largest.
        resize: what becomes of a picture's aspect ratio (see `Preprocessing`).
        chunk: see `TimmBackbone`, for each of them.
        gradient_checkpointing: activations inside of blocks are dropped and computed again in the
            backward pass.

    Raises:
        ValueError: fewer than two backbones, one whose patches are no grid or not the first one's
            with `refuse`, an argument that is set for all, or what a backbone refuses, whose name
            comes first.
    """

    COMPUTE_ONLY: ClassVar = ("chunk", "gradient_checkpointing")

    def __init__(
        self,
        backbones: dict[str, Any],
        align: Align = "interpolate",
        image_size: int | None = None,
        resize: Resize = "stretch",
        chunk: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(backbones) < 2:
            raise ValueError(
                f"backbones has {len(backbones)}, expected two or more; for one, "
                "choose model/vision=timm"
            )
        check_choice("align", align, Align)
        self.align = align
        self.resize = resize
        self.backbones = nn.ModuleDict()
        for name, node in backbones.items():
            with named_errors(f"backbones.{name}"):
                self.backbones[name] = make_backbone(node, image_size, chunk)
        self.set_checkpointing(gradient_checkpointing)
        self.measure()

    def each(self) -> Iterator[tuple[str, TimmBackbone]]:
        """Yields the backbones with their names, in order."""
        for name, backbone in self.backbones.items():
            assert isinstance(backbone, TimmBackbone)
            yield name, backbone

    def measure(self) -> None:
        """Reads width, patches, grid and preprocessing from the backbones. Raises ValueError where
        they do not fit together."""
        (first_name, first), *others = self.each()
        self.grid = first.grid
        for name, backbone in others:
            with named_errors(f"backbones.{name}"):
                self.check_grid(backbone, first_name)
        self.patches = first.patches
        self.width = sum(backbone.width for _, backbone in self.each())
        sizes = [backbone.preprocessing.size for _, backbone in self.each()]
        # the largest: a picture that was made smaller does not regain its details
        largest = max(sizes, key=lambda size: size[0] * size[1])
        self.preprocessing = replace(first.preprocessing, size=largest, resize=self.resize)

    def check_grid(self, backbone: TimmBackbone, first_name: str) -> None:
        """Raises ValueError for patches that cannot be brought to the first backbone's grid."""
        if backbone.grid == self.grid:
            return
        grids = (
            f"its grid is {backbone.grid[0]} x {backbone.grid[1]} patches, and that of "
            f"{first_name} {self.grid[0]} x {self.grid[1]}"
        )
        if self.align == "refuse":
            raise ValueError(f"{grids}; set align: interpolate, or other sizes")
        # (1, P) stands for tokens that are no grid
        if 1 in (backbone.grid[0], self.grid[0]):
            raise ValueError(f"{grids}; a row of tokens is not interpolated")

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the features (N, P, Dv) of pixels (N, 3, H, W), those of the first backbone
        first."""
        features = []
        for _, backbone in self.each():
            view = convert_pixels(pixels, self.preprocessing, backbone.preprocessing)
            features.append(self.on_grid(backbone(view), backbone.grid))
        return torch.cat(features, dim=2)

    def on_grid(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns features (N, P', width) of a grid as (N, P, width)."""
        if grid == self.grid:
            return features
        # torch interpolates over the last two dimensions
        maps = features.transpose(1, 2).unflatten(2, grid)
        resized = F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)

    def set_image_size(self, image_size: int) -> None:
        """Goes on at another size for all backbones. Raises ValueError where one cannot."""
        for name, backbone in self.each():
            with named_errors(f"backbones.{name}"):
                backbone.set_image_size(image_size)
        self.measure()

    def set_checkpointing(self, enable: bool) -> None:
        """Turns `gradient_checkpointing` of every backbone on or off. Raises ValueError where one
        cannot."""
        for name, backbone in self.each():
            with named_errors(f"backbones.{name}"):
                backbone.set_checkpointing(enable)

    def set_compute_option(self, name: str, value: Any) -> None:
        """Changes one of `COMPUTE_ONLY` in every backbone."""
        for backbone_name, backbone in self.each():
            with named_errors(f"backbones.{backbone_name}"):
                backbone.set_compute_option(name, value)

    def check_training(self, sharded: bool) -> None:
        """Raises ValueError where a backbone cannot be trained with its options."""
        for name, backbone in self.each():
            with named_errors(f"backbones.{name}"):
                backbone.check_training(sharded)

    def log_unlearned(self) -> None:
        """Logs it for each backbone."""
        for _, backbone in self.each():
            backbone.log_unlearned()

    def undecayed(self) -> list[nn.Parameter]:
        """Returns those of all backbones."""
        return [parameter for _, backbone in self.each() for parameter in backbone.undecayed()]

    def blocks(self) -> list[list[nn.Parameter]]:
        """Returns the parameters of the backbones' layers, counted from their ends: the last of
        every backbone together, before them the last but one of every backbone, and so on. None
        where a backbone has none: its parameters would be in no layer."""
        blocks_by_backbone = [backbone.blocks() for _, backbone in self.each()]
        if not all(blocks_by_backbone):
            return []
        depth = max(len(blocks) for blocks in blocks_by_backbone)
        joined: list[list[nn.Parameter]] = [[] for _ in range(depth)]
        for blocks in blocks_by_backbone:
            for index, block in enumerate(blocks, start=depth - len(blocks)):
                joined[index] += block
        return joined

    def sharding_units(self) -> list[nn.Module]:
        """Returns the blocks or stages of all backbones, in the order of the forward pass."""
        units = []
        for _, backbone in self.each():
            units += backbone.sharding_units()
        return units

    def compiled_blocks(self) -> list[nn.Module]:
        """Returns the blocks of all backbones."""
        blocks = []
        for _, backbone in self.each():
            blocks += backbone.compiled_blocks()
        return blocks

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Inside, no batch norm uses or moves the batch's statistics."""
        with ExitStack() as stack:
            for _, backbone in self.each():
                stack.enter_context(backbone.statistics_kept())
            yield


def make_backbone(
    node: Mapping[str, Any], image_size: int | None, chunk: int | None
) -> TimmBackbone:
    """Returns the backbone of a node, at the size of all where there is one.

    Raises:
        ValueError: a node of something else than a timm backbone, or with an argument of all.
    """
    if not isinstance(node, Mapping):
        raise ValueError(f"it is {node!r}, expected a mapping with _target_ and the rest")
    target = node.get("_target_")
    backbone_class = get_object(target) if target else None
    if not (isinstance(backbone_class, type) and issubclass(backbone_class, TimmBackbone)):
        raise ValueError(
            f"_target_ is {target}, expected {TimmBackbone.__module__}.{TimmBackbone.__name__}"
        )
    # Hydra's own keys, such as `_target_`
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    if shared := [name for name in SHARED if name in arguments]:
        raise ValueError(f"{shared[0]} is the same for all backbones; remove the key")
    if image_size is not None:
        arguments["image_size"] = image_size
    # tokens are joined one by one, and backbones have other numbers of class tokens
    backbone = backbone_class(**arguments, class_token=False, chunk=chunk)
    if backbone.patches != backbone.grid[0] * backbone.grid[1]:
        raise ValueError(f"its {backbone.patches} tokens are more than its patches")
    return backbone


def convert_pixels(pixels: Tensor, source: Preprocessing, target: Preprocessing) -> Tensor:
    """Returns pixels (N, 3, H, W) that were normalised for one backbone as another one takes them,
    at its size."""
    # equal ones are left alone, so that the first backbone sees its pixels bit for bit
    if (source.mean, source.std) != (target.mean, target.std):
        channels = []
        # plain numbers, which half precisions do not round
        for channel, *numbers in zip(
            pixels.unbind(1), source.mean, source.std, target.mean, target.std, strict=True
        ):
            mean, std, target_mean, target_std = numbers
            channels.append(channel * (std / target_std) + (mean - target_mean) / target_std)
        pixels = torch.stack(channels, dim=1)
    if source.size == target.size:
        return pixels
    resized = F.interpolate(
        pixels.float(), target.size, mode="bicubic", align_corners=False, antialias=True
    )
    return resized.to(pixels.dtype)
