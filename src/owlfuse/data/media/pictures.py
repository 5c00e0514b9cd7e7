"""A chat's pictures and videos become pixels: one view for a picture, several for a tiled picture
or a video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from PIL import Image
from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.core.types import VISUAL, Media, Note, Sample
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.data.media.tiles import best_grid, is_tiled, views_of
from owlfuse.data.media.video import VideoSampling, count_frames, read_frames

if TYPE_CHECKING:
    from owlfuse.data.formats.base import Source


FIRST_PAGE = Note("assumed", "of a picture of several pages or frames the first is shown")


class Preprocess(Protocol):
    """Makes pixels (3, H, W) of `size` (H, W) from a picture."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    @property
    def resize(self) -> str:
        """What becomes of a picture's aspect ratio: `stretch`, `letterbox` or `crop`."""

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return an RGB picture as float32 pixels."""


def visual_parts(sample: Sample) -> list[tuple[str, Media]]:
    """Return (`image` or `video`, path or bytes) of each placeholder of a chat, in order.

    Raises:
        DataError: other counts of placeholders than of images or videos.
    """
    kinds = []
    for message in sample.messages:
        kinds += [part["type"] for part in message["content"] if part["type"] in VISUAL]
    # Each kind has files in the order of its own placeholders.
    files: dict[str, list[Media]] = {"image": sample.images, "video": sample.videos}
    for kind, kind_files in files.items():
        if kinds.count(kind) != len(kind_files):
            raise DataError(
                f"sample {sample.id} has {kinds.count(kind)} <{kind}> placeholders and "
                f"{len(kind_files)} {kind}s"
            )
    iterators = {kind: iter(kind_files) for kind, kind_files in files.items()}
    return [(kind, next(iterators[kind])) for kind in kinds]


@dataclass
class Pictures:
    """Opens a chat's pictures as the backbone sees them.

    Args:
        seed: decides with the sample's id which samples are tiled.
        video: how frames are chosen where a source has no setting of its own.
    """

    preprocess: Preprocess
    max_pixels: int = MAX_PIXELS
    seed: int = 0
    video: VideoSampling = field(default_factory=VideoSampling)

    def __call__(self, sample: Sample, source: Source) -> list[list[Tensor]]:
        """Return for each placeholder its views as pixels (3, H, W): a picture, a tiled picture's
        global view and tiles, or a video's frames in order.

        Raises:
            DataError: see `visual_parts`, `open_image`, `read_frames`.
        """
        # By the sample and not by chance, so that a resumed run tiles the same ones. A question has
        # the views of its chat, by which the chat's length was checked.
        tiled = is_tiled(source.tile, self.seed, sample.chat or sample.id)
        pixels = []
        for kind, file in visual_parts(sample):
            if kind == "video":
                sampling = source.video or self.video
                views = read_frames(source.root, file, sample.id, sampling, self.max_pixels)
            else:
                views = [open_image(source.root, file, sample.id, self.max_pixels)]
                # once for a chat, whose notes are counted by chats
                if views[0].info["pages"] > 1 and FIRST_PAGE not in sample.notes:
                    sample.notes.append(FIRST_PAGE)
                if tiled:
                    views = views_of(views[0], self.preprocess.size)
            pixels.append([self.preprocess(view) for view in views])
        return pixels

    def count_views(self, sample: Sample, source: Source) -> list[int] | None:
        """Return how many views each placeholder has, or None where each has one. Pictures that
        are not tiled are not opened, and videos not decoded.

        Raises:
            DataError: see `__call__`.
        """
        tiled = is_tiled(source.tile, self.seed, sample.chat or sample.id)
        if not tiled and not sample.videos:
            return None
        counts = []
        for kind, file in visual_parts(sample):
            count = 1
            if kind == "video":
                sampling = source.video or self.video
                count = count_frames(source.root, file, sample.id, sampling)
            elif tiled:
                picture = open_image(source.root, file, sample.id, self.max_pixels)
                rows, columns = best_grid(picture.size, self.preprocess.size) or (0, 0)
                count += rows * columns
            counts.append(count)
        return counts
