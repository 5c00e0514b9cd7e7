"""What a backbone is.

N images, P patches, Dv vision width, L extra levels, H and W the picture's size in pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as VF

from owlfuse.model.parts import ModelPart


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> pixels, as the backbone was trained: size (H, W), mean, std and interpolation of
    timm's data configuration.

    The whole picture is resized to the size (as mPLUG-Owl does), so that no border is cut off.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __call__(self, picture: Image.Image) -> Tensor:
        """Returns the normalised pixels (3, H, W), float32, of an RGB picture of any size."""
        resized = picture.resize(self.size[::-1], str_to_pil_interp(self.interpolation))
        pixels = VF.to_dtype(VF.pil_to_tensor(resized), torch.float32, scale=True)
        return VF.normalize(pixels, self.mean, self.std)


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

    def inner_model(self) -> nn.Module:
        """Returns the model that computes the features, whose blocks torch compiles: by default the
        backbone itself."""
        return self
