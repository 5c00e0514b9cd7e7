"""A chat's pictures and videos become pixels: one view for a picture, several for a tiled one or
a video's frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image
from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.core.types import VISUAL, Sample
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.data.media.tiles import is_tiled, views_of
from owlfuse.data.media.video import VideoSampling, read_frames

if TYPE_CHECKING:
    from owlfuse.data.formats.base import Source


class Preprocess(Protocol):
    """A picture becomes pixels (3, H, W) of `size` (H, W)."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB picture -> float32 pixels."""


def visual_parts(sample: Sample) -> list[tuple[str, str | bytes]]:
    """(`image` or `video`, path or bytes) of each placeholder of a chat, in order.

    Raises:
        DataError: other counts of placeholders than of images or videos.
    """
    kinds = [
        part["type"]
        for message in sample.messages
        for part in message["content"]
        if part["type"] in VISUAL
    ]
    for kind, paths in (("image", sample.images), ("video", sample.videos)):
        if kinds.count(kind) != len(paths):
            raise DataError(
                f"sample {sample.id} has {kinds.count(kind)} <{kind}> placeholders and "
                f"{len(paths)} {kind}s"
            )
    left: dict[str, Iterator[Any]] = {"image": iter(sample.images), "video": iter(sample.videos)}
    return [(kind, next(left[kind])) for kind in kinds]


@dataclass
class Pictures:
    """Opens a chat's pictures as the backbone sees them.

    Args:
        seed: decides with the sample's id which samples are tiled.
        video: how frames are chosen where a source does not say.
    """

    preprocess: Preprocess
    max_pixels: int = MAX_PIXELS
    seed: int = 0
    video: VideoSampling = field(default_factory=VideoSampling)

    def __call__(self, sample: Sample, source: Source) -> list[list[Tensor]]:
        """For each placeholder its views as pixels (3, H, W): a picture, a tiled picture's global
        view and tiles, or a video's frames in order.

        Raises:
            DataError: see `visual_parts`, `open_image`, `read_frames`.
        """
        tiled = is_tiled(source.tile, self.seed, sample.id)
        return [
            [self.preprocess(view) for view in self.views(kind, path, sample.id, source, tiled)]
            for kind, path in visual_parts(sample)
        ]

    def views(
        self, kind: str, path: str | bytes, name: str, source: Source, tiled: bool
    ) -> Iterator[Image.Image]:
        """The RGB pictures that one placeholder stands for."""
        if kind == "video":
            yield from read_frames(
                source.root, path, name, source.video or self.video, self.max_pixels
            )
            return
        picture = open_image(source.root, path, name, self.max_pixels)
        yield from views_of(picture, self.preprocess.size) if tiled else [picture]
