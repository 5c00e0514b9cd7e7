"""Frames of videos, decoded by PyAV in a stream: of a long video no more is held than the frames
that are asked for."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from owlfuse.core.errors import DataError, first_line
from owlfuse.core.packages import MissingPackage
from owlfuse.data.media.images import resolve_path

if TYPE_CHECKING:
    import av

SAMPLINGS = Literal["uniform", "fps", "keyframes"]
# Side in pixels of the small frames that changes are measured on. They have colors: a red object
# may be as bright as the grey that it appears on.
SMALL = 20
# Frames a second of a video without times of its frames.
USUAL_RATE = 25.0
# Formats that may be opened. A playlist, which would name further files, is none of them.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,nut,"
    "h264,hevc,ivf,m4v,mjpeg"
)


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
        if type(self.frames) is not int or self.frames < 1:
            raise DataError(
                f"video: frames is {self.frames!r}, expected a whole number of at least 1"
            )
        if type(self.fps) not in (int, float) or not 0 < self.fps < float("inf"):
            raise DataError(f"video: fps is {self.fps!r}, expected a number above 0")

    @classmethod
    def of(cls, node: VideoSampling | dict[str, Any]) -> VideoSampling:
        """Return a configuration's keys as an object. Raises DataError for an unknown key."""
        if isinstance(node, cls):
            return node
        if not isinstance(node, dict):
            raise DataError(f"video: is a {type(node).__name__}, expected keys and values")
        keys = [field.name for field in fields(cls)]
        if unknown := sorted(set(node) - set(keys)):
            raise DataError(f"video: no such key: {unknown[0]}; expected {', '.join(keys)}")
        return cls(**node)


def read_frames(
    root: Path,
    path: str | bytes,
    name: str,
    sampling: VideoSampling,
    max_pixels: int,
) -> list[Image.Image]:
    """Return the chosen frames of the video at `path` below `root`, or of its encoded bytes, in
    order, RGB and upright.

    Raises:
        DataError: a path that leaves the root, no such file, no video, no frames, corrupt data
            anywhere that is read, or frames of more than `max_pixels`; names the sample `name`.
        MissingPackage: PyAV is not installed.
    """
    file, label = file_and_label(root, path, name)
    if sampling.sampling == "keyframes":
        small, index = small_frames(file, label, max_pixels)
        chosen = keyframe_indices(small, sampling.frames)
    else:
        times, index = frame_times(file, label)
        if sampling.sampling == "fps":
            chosen = fps_indices(times, sampling.fps, sampling.frames)
        else:
            chosen = uniform_indices(times, sampling.frames)
    marks = [index.marks[k] for k in chosen]
    try:
        frames = frames_at(file, label, marks, index.keys, max_pixels)
    # A frame after a key frame may need some from before it (an open group of pictures).
    except DataError:
        frames = frames_at(file, label, marks, index.keys[:1], max_pixels)
    if not frames:
        raise DataError(f"{label} has no frames that can be decoded")
    return frames


def count_frames(root: Path, path: str | bytes, name: str, sampling: VideoSampling) -> int:
    """Return how many frames `read_frames` chooses; nothing is decoded. Raises as it does."""
    times, _ = frame_times(*file_and_label(root, path, name))
    if sampling.sampling == "fps":
        return len(fps_indices(times, sampling.fps, sampling.frames))
    return min(len(times) - 1, sampling.frames)


def file_and_label(root: Path, path: str | bytes, name: str) -> tuple[Path | bytes, str]:
    """Return the file at `path` below `root`, or encoded bytes as they are, and what it is called
    in messages. Raises DataError."""
    if isinstance(path, bytes):
        return path, f"sample {name}: video of {len(path):,} bytes"
    return video_file(root, path, name), f"sample {name}: video {path}"


def video_file(root: Path, path: str, name: str) -> Path:
    """Return the file at `path` below `root`. Raises DataError where it is missing, not below it or
    no ordinary file."""
    try:
        file = resolve_path(root, path, f"sample {name}: video {path}", "video")
        if not file.exists():
            hint = "; the folders of a path are divided by /" if "\\" in path else ""
            raise DataError(f"sample {name}: no video {path} in {root}{hint}")
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, or links in a circle
        raise DataError(f"sample {name}: video {path!r:.200} is no path: {error!s:.200}") from error
    return file


@dataclass(frozen=True)
class Index:
    """The times of a video's frames.

    Attributes:
        marks: the time of each frame, ascending, in the stream's own units; its number where the
            video has no times.
        keys: the marks of the first frame, and of those that decoding can start at; none where the
            marks are numbers.
    """

    marks: list[int]
    keys: list[int]

    @classmethod
    def of(cls, frames: list[tuple[int | None, bool]]) -> Index:
        """Return the index of (time, whether decoding can start there) of each frame."""
        if any(mark is None for mark, _ in frames):
            return cls(list(range(len(frames))), [])
        marks = sorted(mark for mark, _ in frames if mark is not None)
        keys = {mark for mark, is_key in frames if mark is not None and is_key}
        # A clip may begin after a key frame.
        return cls(marks, sorted({marks[0], *keys}))


def frames_at(
    file: Path | bytes,
    label: str,
    marks: list[int],
    keys: list[int],
    max_pixels: int,
) -> list[Image.Image]:
    """Return the frames at `marks`, ascending, as pictures. Frames between them are skipped, from
    one of `keys` to another; where the file's own index is wrong, everything is decoded."""
    pictures: list[Image.Image] = []
    with opened(file, label) as (container, stream):
        check_size(stream, label, max_pixels)
        frames = enumerate(container.decode(stream))
        position = keys[0] if keys else 0
        for mark in marks:
            key = position
            if keys and keys[0] <= mark:
                key = keys[bisect_right(keys, mark) - 1]
            # Seeking saves decoding only where a key frame lies between here and there.
            has_sought = key > position
            if has_sought:
                container.seek(key, stream=stream)
                frames = enumerate(container.decode(stream))
            for number, frame in frames:
                if not keys:
                    position = number
                elif frame.pts is not None:
                    position = frame.pts
                # The index led past the frame, so that all is decoded from the start.
                if has_sought and number == 0 and position > mark:
                    return frames_at(file, label, marks, keys[:1], max_pixels)
                if position >= mark:
                    pictures.append(upright(frame))
                    break
    return pictures


@contextmanager
def opened(
    file: Path | bytes, label: str
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Yield a video's container and its video stream: of several the one that players show, as
    FFmpeg chooses it. What PyAV raises inside becomes a DataError."""
    try:
        # here, since PyAV is an extra
        import av
    except ModuleNotFoundError:
        raise MissingPackage(
            f"{label} needs PyAV: pip install 'owlfuse[video]'", name="av"
        ) from None
    # Nothing but the file itself is read: FFmpeg follows addresses inside of other formats.
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    source: Any = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    try:
        with av.open(source, "r", options=options) as container:
            stream = video_stream(container, label)
            # A decoder would paint over broken data otherwise.
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{label} cannot be read: {reason}") from error


def video_stream(container: av.container.InputContainer, label: str) -> av.VideoStream:
    """Return the best video stream that is no picture of a cover. Raises DataError."""
    from av.stream import Disposition

    streams = []
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            streams.append(stream)
    if not streams:
        only_cover = ", only a picture of its cover" if container.streams.video else ""
        raise DataError(f"{label} has no video stream{only_cover}")
    # FFmpeg's best may be the cover.
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), streams[0])


def frame_times(file: Path | bytes, label: str) -> tuple[list[float], Index]:
    """Return the seconds at which the frames are shown, from 0 on, and the end of the last. They
    are read from packets, without decoding; frames that an edit list cuts off are left out."""
    packets = []
    with opened(file, label) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.duration, packet.is_keyframe))
        rate = float(stream.average_rate or USUAL_RATE)
        base = stream.time_base
    if not packets:
        raise DataError(f"{label} has no frames")
    index = Index.of([(pts, is_key) for pts, _, is_key in packets])
    if not index.keys or base is None:
        times = [number / rate for number in range(len(packets) + 1)]
        return times, Index.of([(None, False)] * len(packets))
    times = [float((mark - index.marks[0]) * base) for mark in index.marks]
    durations = {pts: duration for pts, duration, _ in packets}
    last_duration = durations[index.marks[-1]]
    # Some files do not say how long their last frame is shown.
    end = times[-1] + (float(last_duration * base) if last_duration else 1 / rate)
    return [*times, end], index


def small_frames(file: Path | bytes, label: str, max_pixels: int) -> tuple[np.ndarray, Index]:
    """Return every frame made small, as RGB: (frames, SMALL * SMALL * 3) uint8, 1.2 KB a frame."""
    small, frames = bytearray(), []
    with opened(file, label) as (container, stream):
        from av.video.reformatter import VideoReformatter

        check_size(stream, label, max_pixels)
        # One for all frames: setting it up takes longer than decoding a frame.
        scaler = VideoReformatter()
        for frame in container.decode(stream):
            scaled = scaler.reformat(frame, SMALL, SMALL, "rgb24", interpolation="AREA")
            small += scaled.to_ndarray().tobytes()
            frames.append((frame.pts, frame.key_frame))
    if not frames:
        raise DataError(f"{label} has no frames")
    rows = np.frombuffer(small, np.uint8).reshape(len(frames), -1)
    return rows, Index.of(frames)


def check_size(stream: av.VideoStream, label: str, max_pixels: int) -> None:
    """Raise DataError for frames of more than `max_pixels`, before one is decoded."""
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > max_pixels:
        raise DataError(
            f"{label} has frames of {pixels:,} pixels, over the limit of {max_pixels:,}"
        )


# PQ and HLG, of ITU-T H.273.
HDR = (16, 18)


def upright(frame: av.VideoFrame) -> Image.Image:
    """Return a frame as RGB, turned as the video's own rotation says."""
    options: dict[str, Any] = {}
    # An iPhone's HDR, whose numbers are not those of a usual screen: without a change of them white
    # would be grey.
    if getattr(frame, "color_trc", None) in HDR:  # which older PyAVs do not tell
        from av.video.reformatter import ColorPrimaries, ColorTrc

        options = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
    return frame.to_image(**options).rotate(frame.rotation, expand=True)


# Small frames compared at a time.
BLOCK = 4096


def fps_indices(times: list[float], fps: float, frames: int) -> list[int]:
    """Return a frame every 1 / `fps` seconds from the first on, ascending; `uniform_indices` where
    those are more than `frames`.

    Args:
        times: seconds at which the frames are shown, from 0 on, and the end of the last.
    """
    *shown, end = times
    # 1e-6: a time that is a sum of floats may be just below a frame's.
    count = max(1, int(end * fps + 1e-6))
    if count > frames:
        return uniform_indices(times, frames)
    chosen = set()
    for k in range(count):
        moment = k / fps + 1e-6
        chosen.add(bisect_right(shown, moment) - 1)
    return sorted(chosen)


def uniform_indices(times: list[float], frames: int) -> list[int]:
    """Return the frames at the middles of `frames` equal parts of the time, ascending; all of a
    video that has fewer frames.

    Where one frame is at the middle of several parts, more frames go into the widest gaps.

    Args:
        times: seconds at which the frames are shown, from 0 on, and the end of the last.
    """
    *shown, end = times
    if len(shown) <= frames:
        return list(range(len(shown)))
    chosen = set()
    for k in range(frames):
        moment = (k + 0.5) * end / frames + 1e-6
        chosen.add(max(0, bisect_right(shown, moment) - 1))
    return fill_gaps(chosen, len(shown), frames)


def keyframe_indices(small: np.ndarray, frames: int) -> list[int]:
    """Return the first frame, and then again and again the one that differs most from all that are
    chosen, ascending.

    A difference is the mean square over small frames, so that much change in a small part of the
    picture counts, less the usual difference of one frame from the next: noise, and steady motion.
    Where no frame differs, more frames go into the widest gaps.
    """
    if len(small) <= frames:
        return list(range(len(small)))
    starts = range(0, len(small), BLOCK)
    steps = []
    for start in starts:
        following = small[start + 1 : start + 1 + BLOCK]
        steps.append(mean_squares(small[start : start + BLOCK], following))
    # The median: most frames follow another of the same scene. 1: rounding of uint8.
    usual = 1.25 * np.median(np.concatenate(steps)) + 1
    nearest = np.full(len(small), np.inf)
    chosen = {0}
    last = 0
    while len(chosen) < frames:
        last_frame = small[last : last + 1]
        blocks = [mean_squares(small[start : start + BLOCK], last_frame) for start in starts]
        nearest = np.minimum(nearest, np.concatenate(blocks))
        last = int(nearest.argmax())
        if nearest[last] <= usual:
            break
        chosen.add(last)
    return fill_gaps(chosen if len(chosen) > 1 else set(), len(small), frames)


def mean_squares(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the mean squared differences of rows (K, P) and (K or 1, P) -> (K,); surplus rows of
    the longer one are left out."""
    count = len(rows)
    if len(others) > 1:
        count = min(count, len(others))
    differences = rows[:count].astype(np.float32) - others[:count]
    return np.square(differences).mean(1)


def fill_gaps(chosen: set[int], count: int, frames: int) -> list[int]:
    """Add to `chosen` as many of the `count` frames more as make `frames`, each in the middle of
    the widest gap, and return all, ascending."""
    if not chosen:
        return [(2 * k + 1) * count // (2 * frames) for k in range(frames)]
    while len(chosen) < frames:
        borders = sorted({-1, *chosen, count})
        low, high = max(pairwise(borders), key=lambda gap: gap[1] - gap[0])
        chosen.add((low + high) // 2)
    return sorted(chosen)
