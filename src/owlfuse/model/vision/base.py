"""What a backbone is.

N images, P patches, Dv vision width, L extra levels, H and W the picture's size in pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageOps
from timm.data.transforms import str_to_pil_interp
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as VF

from owlfuse.model.parts import ModelPart, check_choice

Resize = Literal["stretch", "letterbox", "crop"]
"""What becomes of a picture's aspect ratio, see `Preprocessing`."""


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> pixels, as the backbone was trained: size (H, W), mean, std and interpolation of
    timm's data configuration.

    Attributes:
        resize: how a picture of another aspect ratio is brought to the size. `stretch`: as a whole
            and distorted, as mPLUG-Owl does. `letterbox`: as a whole, between bars of the mean
            colour, as LLaVA-1.5's `pad` (arXiv 2310.03744); PIL's `ImageOps.pad`. `crop`: the
            largest part in the middle that has the size's aspect ratio, as CLIP does but for half
            a pixel (arXiv 2103.00020); PIL's `ImageOps.fit`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize: Resize = "stretch"

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown way to resize, as a processor's file may have."""
        check_choice("resize", self.resize, Resize)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Returns the normalised pixels (3, H, W), float32, of an RGB picture of any size."""
        pixels = VF.to_dtype(VF.pil_to_tensor(self.view(picture)), torch.float32, scale=True)
        return VF.normalize(pixels, self.mean, self.std)

    def view(self, picture: Image.Image) -> Image.Image:
        """Returns an RGB picture at the size, as the backbone sees it but for the normalisation."""
        size = self.size[::-1]
        method = str_to_pil_interp(self.interpolation)
        if self.resize == "crop":
            return ImageOps.fit(picture, size, method)
        if self.resize == "stretch":
            return picture.resize(size, method)
        # not ImageOps.pad, which refuses a picture so long that its short side rounds to 0; and
        # resized first, since a long picture with its bars may be more than memory holds
        width, height = size
        if picture.width / picture.height > size[0] / size[1]:
            # at least one pixel, since PIL refuses a picture without any
            height = max(1, round(picture.height / picture.width * size[0]))
        else:
            width = max(1, round(picture.width / picture.height * size[1]))
        # rounded down, as in LLaVA
        fill = tuple(int(channel * 255) for channel in self.mean)
        view = Image.new("RGB", size, fill)
        corner = round((size[0] - width) / 2), round((size[1] - height) / 2)
        view.paste(picture.resize((width, height), method), corner)
        return view

    def region(self, picture_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Returns (left, top, right, bottom) of the view in pixels of a picture of (width, height):
        inside of the picture where it is cropped, and beyond it where it has bars."""
        width, height = picture_size
        if self.resize == "stretch":
            return 0.0, 0.0, float(width), float(height)
        ratios = width / self.size[1], height / self.size[0]
        # pixels of the picture for one of the view
        scale = min(ratios) if self.resize == "crop" else max(ratios)
        left = (width - self.size[1] * scale) / 2
        top = (height - self.size[0] * scale) / 2
        return left, top, width - left, height - top


class Backbone(ModelPart):
    """Pixels (N, 3, H, W) -> features (N, P, Dv); with extra levels, (N, 1 + L, P, Dv).

    Attributes:
        width: Dv.
        patches: P, with a class token where there is one.
        grid: (h, w) of the patches; (1, P) where they are no grid.
        preprocessing: what makes pixels of a picture.
        extra_levels: L, the levels that are given beside the last one, for fusions that read each
            (DeepStack, arXiv 2406.04334).
    """

    width: int
    patches: int
    grid: tuple[int, int]
    preprocessing: Preprocessing
    extra_levels: int = 0

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the features of pixels: (N, P, Dv) without extra levels. With L of them,
        (N, 1 + L, P, Dv): at index 0 the last level, which a backbone without extra levels gives,
        and behind it the L others from shallow to deep."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def undecayed(self) -> list[nn.Parameter]:
        """Returns parameters that have no weight decay beside those whose names say so
        (see `owlfuse.training.optim.has_decay`): by default none."""
        return []

    def set_image_size(self, image_size: int) -> None:
        """Goes on with pictures of another side in pixels.

        Raises:
            ValueError: the backbone cannot, as by default.
        """
        raise ValueError(f"{type(self).__name__} has pictures of one size alone")

    def statistics_kept(self) -> AbstractContextManager[None]:
        """Returns a context in which no statistics of a batch are used or moved, for the blank
        image of a batch without images. By default there are none."""
        return nullcontext()

    def log_unlearned(self) -> None:
        """Logs what has no effect in a run from the start, since the part is frozen; nothing by
        default."""

    def inner_model(self) -> nn.Module:
        """Returns the model that computes the features: by default the backbone itself."""
        return self

    def compiled_blocks(self) -> list[nn.Module]:
        """Returns the modules that torch compiles one by one: by default those of the inner model's
        list called `blocks`, `stages` or `layers`; none where it has no such list."""
        children = dict(self.inner_model().named_children())
        for name in ("blocks", "stages", "layers"):
            if name in children:
                return list(children[name].children())
        return []
