"""Frames of videos, decoded by PyAV in a stream: of a long video no more is held than the frames that are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from owlfuse.types import DataError

if TYPE_CHECKING:
    import av

SAMPLINGS = Literal["uniform", "fps", "keyframes"]
SMALL = 20
"""Side in pixels of the small frames that changes are measured on. They have colors: a red thing may be as bright as the grey
that it appears on."""
BLOCK = 4096
"""Small frames compared at a time."""
USUAL_RATE = 25.0
"""Frames a second of a video that does not say when its frames are shown."""
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,nut,h264,hevc,ivf,m4v,mjpeg"
"""What may be opened. A playlist, which would name further files, is none of them."""


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video a model sees.

    Args:
        sampling: `uniform`: the middle frames of `frames` equally long parts; `fps`: a frame every 1 / `fps` seconds, and
            `uniform` where those would be more than `frames`; `keyframes`: where the picture changes, so that a short event
            in a long clip is seen.
        frames: at most so many, all of a video that has fewer.
        fps: frames a second.

    Raises:
        DataError: an unknown sampling, or a number that is not above 0.
    """

    sampling: SAMPLINGS = "uniform"
    frames: int = 8
    fps: float = 1.0

    def __post_init__(self) -> None:
        if self.sampling not in get_args(SAMPLINGS):
            raise DataError(f"video: sampling is {self.sampling!r}, expected one of {', '.join(get_args(SAMPLINGS))}")
        if not isinstance(self.frames, int) or self.frames < 1:
            raise DataError(f"video: frames is {self.frames!r}, expected a whole number of at least 1")
        if not isinstance(self.fps, int | float) or not 0 < self.fps < float("inf"):
            raise DataError(f"video: fps is {self.fps!r}, expected a number above 0")

    @classmethod
    def of(cls, node: VideoSampling | dict[str, Any]) -> VideoSampling:
        """A configuration's keys as an object. Raises DataError for a key that there is not."""
        if isinstance(node, cls):
            return node
        if not isinstance(node, dict):
            raise DataError(f"video: is a {type(node).__name__}, expected keys and values")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(node) - set(known)):
            raise DataError(f"video: no such key: {unknown[0]}; expected {', '.join(known)}")
        return cls(**node)


def read_frames(root: Path, path: str, name: str, sampling: VideoSampling, max_pixels: int) -> list[Image.Image]:
    """The chosen frames of the video at `path` below `root`, in order, RGB and upright.

    Raises:
        DataError: a path that leaves the root, no such file, no video, a video without frames, one that is corrupt anywhere
            that is read, or frames of more than `max_pixels`; names the sample `name`.
        ModuleNotFoundError: PyAV is not installed.
    """
    file = (root / path).resolve()
    if not file.is_relative_to(root.resolve()):
        raise DataError(f"sample {name}: video {path} leaves the image root {root}")
    if not file.is_file():
        raise DataError(f"sample {name}: no video {path} in {root}")
    what = f"sample {name}: video {path}"
    times = frame_times(file, what)
    if sampling.sampling == "keyframes" and len(times) > sampling.frames:
        chosen = keyframe_indices(small_frames(file, what, max_pixels), sampling.frames)
    else:
        chosen = time_indices(times, sampling)
    wanted, found = set(chosen), []
    with opened(file, what) as (container, stream):
        check_size(stream, what, max_pixels)
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                found.append(upright(frame))
                if len(found) == len(wanted):
                    break
    if not found:
        raise DataError(f"{what} has no frames that can be decoded")
    return found


@contextmanager
def opened(file: Path, what: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A video's container and its first video stream. What PyAV raises inside becomes a DataError."""
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{what} needs PyAV: pip install owlfuse[video]", name="av") from None
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        with av.open(str(file), options=options) as container:
            if not container.streams.video:
                raise DataError(f"{what} has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}  # a decoder paints over what is broken otherwise
            yield container, stream
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{what} cannot be read: {reason}") from error


def frame_times(file: Path, what: str) -> list[float]:
    """Seconds at which the frames are shown, from 0 on, and the end of the last: read from packets, nothing is decoded."""
    with opened(file, what) as (container, stream):
        packets = [(p.pts, p.duration) for p in container.demux(stream) if p.size]
        rate = float(stream.average_rate or USUAL_RATE)
        base = stream.time_base
    if not packets:
        raise DataError(f"{what} has no frames")
    if base is None or any(pts is None for pts, _ in packets):
        return [index / rate for index in range(len(packets) + 1)]
    shown = sorted(pts for pts, _ in packets)
    times = [float((pts - shown[0]) * base) for pts in shown]
    last = max(packets, key=lambda packet: packet[0])[1]
    return [*times, times[-1] + (float(last * base) if last else 1 / rate)]


def time_indices(times: list[float], sampling: VideoSampling) -> list[int]:
    """The frames of `uniform` or `fps`, ascending; `times` as `frame_times` gives them."""
    *shown, end = times
    count = len(shown)
    if sampling.sampling == "fps":
        wanted = max(1, int(end * sampling.fps + 1e-6))
        if wanted <= sampling.frames:
            moments = [(k + 1e-6) / sampling.fps for k in range(wanted)]
            return sorted({max(0, bisect_right(shown, moment) - 1) for moment in moments})
    if count <= sampling.frames:
        return list(range(count))
    moments = [(k + 0.5) * end / sampling.frames for k in range(sampling.frames)]
    chosen = {max(0, bisect_right(shown, moment) - 1) for moment in moments}
    return fill(chosen, count, sampling.frames)


def small_frames(file: Path, what: str, max_pixels: int) -> np.ndarray:
    """Every frame made small, as RGB: (frames, SMALL * SMALL * 3) uint8, 1.2 KB a frame."""
    small = []
    with opened(file, what) as (container, stream):
        check_size(stream, what, max_pixels)
        for frame in container.decode(stream):
            small.append(frame.reformat(width=SMALL, height=SMALL, format="rgb24").to_ndarray().reshape(-1))
    if not small:
        raise DataError(f"{what} has no frames that can be decoded")
    return np.stack(small)


def keyframe_indices(small: np.ndarray, frames: int) -> list[int]:
    """The first frame, and then again and again the one that differs most from all that are chosen, ascending.

    A difference is the mean square over small frames, so that much change in a small place counts, less what one frame
    usually differs from the next by: noise, and what moves all the time. Where no frame differs, what is left of `frames` goes
    into the widest gaps.
    """
    if len(small) <= frames:
        return list(range(len(small)))
    starts = range(0, len(small), BLOCK)
    steps = [difference(small[start : start + BLOCK], small[start + 1 : start + 1 + BLOCK]) for start in starts]
    usual = 1.25 * np.median(np.concatenate(steps)) + 1
    nearest = np.full(len(small), np.inf)
    chosen = {0}
    last = 0
    while len(chosen) < frames:
        now = [difference(small[start : start + BLOCK], small[last : last + 1]) for start in starts]
        nearest = np.minimum(nearest, np.concatenate(now))
        last = int(nearest.argmax())
        if nearest[last] <= usual:
            break
        chosen.add(last)
    return fill(chosen if len(chosen) > 1 else set(), len(small), frames)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean squared differences of rows (K, P) and (K or 1, P) -> (K,); of rows that are too many, the last are left out."""
    count = len(one) if len(other) == 1 else min(len(one), len(other))
    return np.square(one[:count].astype(np.float32) - other[:count]).mean(1)


def fill(chosen: set[int], count: int, frames: int) -> list[int]:
    """`chosen` and as many of the `count` frames more as make `frames`, each in the middle of the widest gap, ascending."""
    if not chosen:
        return [(2 * k + 1) * count // (2 * frames) for k in range(frames)]
    chosen = set(chosen)
    while len(chosen) < frames:
        borders = sorted({-1, *chosen, count})
        low, high = max(pairwise(borders), key=lambda gap: gap[1] - gap[0])
        chosen.add((low + high) // 2)
    return sorted(chosen)


def check_size(stream: av.VideoStream, what: str, max_pixels: int) -> None:
    """Raises DataError for frames of more than `max_pixels`, before one is decoded."""
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > max_pixels:
        raise DataError(f"{what} has frames of {pixels:,} pixels, over the limit of {max_pixels:,}")


def upright(frame: av.VideoFrame) -> Image.Image:
    """A frame as RGB, turned as the video says that it is shown."""
    return frame.to_image().rotate(frame.rotation, expand=True)
