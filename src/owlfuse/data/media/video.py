"""Frames of videos, decoded by PyAV in a stream: of a long video no more is held than the frames
that are asked for."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.core.packages import MissingPackage

if TYPE_CHECKING:
    import av

SAMPLINGS = Literal["uniform", "fps", "keyframes"]
SMALL = 20
"""Side in pixels of the small frames that changes are measured on. They have colors: a red thing
may be as bright as the grey that it appears on."""
USUAL_RATE = 25.0
"""Frames a second of a video that does not say when its frames are shown."""
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,nut,"
    "h264,hevc,ivf,m4v,mjpeg"
)
"""What may be opened. A playlist, which would name further files, is none of them."""


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video a model sees.

    Args:
        sampling: `uniform`: the middle frames of `frames` equally long parts; `fps`: a frame every
            1 / `fps` seconds, and `uniform` where those would be more than `frames`; `keyframes`:
            where the picture changes, so that a short event in a long clip is seen.
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
            raise DataError(
                f"video: sampling is {self.sampling!r}, expected one of "
                f"{', '.join(get_args(SAMPLINGS))}"
            )
        if not isinstance(self.frames, int) or self.frames < 1:
            raise DataError(
                f"video: frames is {self.frames!r}, expected a whole number of at least 1"
            )
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


def read_frames(
    root: Path, path: str | bytes, name: str, sampling: VideoSampling, max_pixels: int
) -> list[Image.Image]:
    """The chosen frames of the video at `path` below `root`, or of its encoded bytes, in order, RGB
    and upright.

    Raises:
        DataError: a path that leaves the root, no such file, no video, a video without frames, one
            that is corrupt anywhere that is read, or frames of more than `max_pixels`; names the
            sample `name`.
        MissingPackage: PyAV is not installed.
    """
    if isinstance(path, bytes):
        file: Path | bytes = path
        what = f"sample {name}: video of {len(path):,} bytes"
    else:
        file = video_file(root, path, name)
        what = f"sample {name}: video {path}"
    if sampling.sampling == "keyframes":
        small, index = small_frames(file, what, max_pixels)
        chosen = keyframe_indices(small, sampling.frames)
    else:
        times, index = frame_times(file, what)
        by_fps = sampling.sampling == "fps"
        chosen = (
            fps_indices(times, sampling.fps, sampling.frames)
            if by_fps
            else uniform_indices(times, sampling.frames)
        )
    marks = [index.marks[k] for k in chosen]
    try:
        found = frames_at(file, what, marks, index.keys, max_pixels)
    # a frame after a key frame may need some from before it (an open group of pictures)
    except DataError:
        found = frames_at(file, what, marks, index.keys[:1], max_pixels)
    if not found:
        raise DataError(f"{what} has no frames that can be decoded")
    return found


def video_file(root: Path, path: str, name: str) -> Path:
    """The file at `path` below `root`. Raises DataError where it is not there or not below it."""
    try:
        file = (root / path).resolve()
        inside, there = file.is_relative_to(root.resolve()), file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, or links in a circle
        raise DataError(f"sample {name}: video {path!r:.200} is no path: {error!s:.200}") from error
    if not inside:
        raise DataError(f"sample {name}: video {path} leaves the image root {root}")
    if not there:
        raise DataError(f"sample {name}: no video {path} in {root}")
    return file


@dataclass(frozen=True)
class Index:
    """Where a video's frames are.

    Attributes:
        marks: of each frame, ascending: when it is shown, in the stream's own units; its number
            where the video does not say.
        keys: the marks of the first frame, and of those that decoding can start at; none where the
            marks are numbers.
    """

    marks: list[int]
    keys: list[int]

    @classmethod
    def of(cls, shown: list[tuple[int | None, bool]]) -> Index:
        """From (when shown, whether decoding can start there) of each frame."""
        timed = [(mark, key) for mark, key in shown if mark is not None]
        if len(timed) < len(shown):
            return cls(list(range(len(shown))), [])
        marks = sorted(mark for mark, _ in timed)
        # a clip may begin after a key frame
        return cls(marks, sorted({marks[0], *(mark for mark, key in timed if key)}))


def frames_at(
    file: Path | bytes, what: str, marks: list[int], keys: list[int], max_pixels: int
) -> list[Image.Image]:
    """The frames at `marks`, ascending, as pictures. What lies between them is passed over, from
    one of `keys` to another; where the file's own index leads astray, everything is decoded."""
    found: list[Image.Image] = []
    with opened(file, what) as (container, stream):
        check_size(stream, what, max_pixels)
        frames = enumerate(container.decode(stream))
        position = keys[0] if keys else 0
        for mark in marks:
            key = keys[bisect_right(keys, mark) - 1] if keys and keys[0] <= mark else position
            sought = key > position
            if sought:
                container.seek(key, stream=stream)
                frames = enumerate(container.decode(stream))
            for number, frame in frames:
                position = (position if frame.pts is None else frame.pts) if keys else number
                if sought and number == 0 and position > mark:
                    return frames_at(file, what, marks, keys[:1], max_pixels)
                if position >= mark:
                    found.append(upright(frame))
                    break
    return found


@contextmanager
def opened(
    file: Path | bytes, what: str
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A video's container and its video stream: of several the one that players show, as FFmpeg
    chooses it. What PyAV raises inside becomes a DataError."""
    try:
        import av
    except ModuleNotFoundError:
        raise MissingPackage(
            f"{what} needs PyAV: pip install 'owlfuse[video]'", name="av"
        ) from None
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        with av.open(
            io.BytesIO(file) if isinstance(file, bytes) else str(file), "r", options=options
        ) as container:
            cover = av.stream.Disposition.attached_pic
            streams = [
                stream for stream in container.streams.video if not stream.disposition & cover
            ]
            if not streams:
                only_cover = ", only a picture of its cover" if container.streams.video else ""
                raise DataError(f"{what} has no video stream{only_cover}")
            best = container.streams.best("video")
            stream = next((stream for stream in streams if stream is best), streams[0])
            # a decoder paints over what is broken otherwise
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{what} cannot be read: {reason}") from error


def frame_times(file: Path | bytes, what: str) -> tuple[list[float], Index]:
    """Seconds at which the frames are shown, from 0 on, and the end of the last: read from packets,
    nothing is decoded. What an edit list cuts off is not shown."""
    with opened(file, what) as (container, stream):
        packets = [
            (p.pts, p.duration, p.is_keyframe)
            for p in container.demux(stream)
            if p.size and not p.is_discard
        ]
        rate = float(stream.average_rate or USUAL_RATE)
        base = stream.time_base
    if not packets:
        raise DataError(f"{what} has no frames")
    index = Index.of([(pts, key) for pts, _, key in packets])
    if not index.keys or base is None:
        return [number / rate for number in range(len(packets) + 1)], Index.of(
            [(None, False)] * len(packets)
        )
    times = [float((mark - index.marks[0]) * base) for mark in index.marks]
    last = max(
        ((pts, duration) for pts, duration, _ in packets if pts is not None), key=itemgetter(0)
    )[1]
    return [*times, times[-1] + (float(last * base) if last else 1 / rate)], index


def small_frames(file: Path | bytes, what: str, max_pixels: int) -> tuple[np.ndarray, Index]:
    """Every frame made small, as RGB: (frames, SMALL * SMALL * 3) uint8, 1.2 KB a frame."""
    small, shown = bytearray(), []
    with opened(file, what) as (container, stream):
        from av.video.reformatter import VideoReformatter

        check_size(stream, what, max_pixels)
        # one for all frames: setting it up takes longer than decoding a frame
        scaler = VideoReformatter()
        for frame in container.decode(stream):
            small += (
                scaler.reformat(frame, SMALL, SMALL, "rgb24", interpolation="AREA")
                .to_ndarray()
                .tobytes()
            )
            shown.append((frame.pts, frame.key_frame))
    if not shown:
        raise DataError(f"{what} has no frames")
    return np.frombuffer(small, np.uint8).reshape(len(shown), -1), Index.of(shown)


def check_size(stream: av.VideoStream, what: str, max_pixels: int) -> None:
    """Raises DataError for frames of more than `max_pixels`, before one is decoded."""
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > max_pixels:
        raise DataError(f"{what} has frames of {pixels:,} pixels, over the limit of {max_pixels:,}")


def upright(frame: av.VideoFrame) -> Image.Image:
    """A frame as RGB, turned as the video says that it is shown."""
    return frame.to_image().rotate(frame.rotation, expand=True)


BLOCK = 4096
"""Small frames compared at a time."""


def fps_indices(times: list[float], fps: float, frames: int) -> list[int]:
    """A frame every 1 / `fps` seconds from the first on, ascending; `uniform_indices` where those
    are more than `frames`.

    Args:
        times: seconds at which the frames are shown, from 0 on, and the end of the last.
    """
    *shown, end = times
    wanted = max(1, int(end * fps + 1e-6))
    if wanted > frames:
        return uniform_indices(times, frames)
    return sorted({max(0, bisect_right(shown, k / fps + 1e-6) - 1) for k in range(wanted)})


def uniform_indices(times: list[float], frames: int) -> list[int]:
    """What is shown at the middles of `frames` equal parts of the time, ascending; all of a video
    that has fewer frames.

    Where one frame stands for several parts, what is left goes into the widest gaps.

    Args:
        times: seconds at which the frames are shown, from 0 on, and the end of the last.
    """
    *shown, end = times
    if len(shown) <= frames:
        return list(range(len(shown)))
    moments = [(k + 0.5) * end / frames + 1e-6 for k in range(frames)]
    return fill({max(0, bisect_right(shown, moment) - 1) for moment in moments}, len(shown), frames)


def keyframe_indices(small: np.ndarray, frames: int) -> list[int]:
    """The first frame, and then again and again the one that differs most from all that are chosen,
    ascending.

    A difference is the mean square over small frames, so that much change in a small place counts,
    less what one frame usually differs from the next by: noise, and what moves all the time. Where
    no frame differs, what is left of `frames` goes into the widest gaps.
    """
    if len(small) <= frames:
        return list(range(len(small)))
    starts = range(0, len(small), BLOCK)
    steps = [
        difference(small[start : start + BLOCK], small[start + 1 : start + 1 + BLOCK])
        for start in starts
    ]
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
    """Mean squared differences of rows (K, P) and (K or 1, P) -> (K,); of rows that are too
    many, the last are left out."""
    count = len(one) if len(other) == 1 else min(len(one), len(other))
    return np.square(one[:count].astype(np.float32) - other[:count]).mean(1)


def fill(chosen: set[int], count: int, frames: int) -> list[int]:
    """`chosen` and as many of the `count` frames more as make `frames`, each in the middle of
    the widest gap, ascending."""
    if not chosen:
        return [(2 * k + 1) * count // (2 * frames) for k in range(frames)]
    chosen = set(chosen)
    while len(chosen) < frames:
        borders = sorted({-1, *chosen, count})
        low, high = max(pairwise(borders), key=lambda gap: gap[1] - gap[0])
        chosen.add((low + high) // 2)
    return sorted(chosen)
