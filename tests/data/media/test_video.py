"""Frames of videos: which are chosen, that a short event is seen, and videos that are wrong."""

import io
import json
import os
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.media import video
from owlfuse.data.media import video as frames_of
from owlfuse.data.media.video import VideoSampling, read_frames
from owlfuse.model.vision.backbone import Preprocessing

av = pytest.importorskip("av")

LIMIT = 10**8


def write_video(
    path,
    seconds,
    rate=10,
    paint=lambda picture, time: None,
    size=(64, 48),
    codec="libx264",
    rotation=0,
    options=None,
):
    """A clip of grey frames that `paint` draws on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(round(seconds * rate)):
            picture = np.full((size[1], size[0], 3), 90, np.uint8)
            paint(picture, index / rate)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.name


def clock(seconds):
    """Paints the time as a level of grey, from black at the start to white at the end."""

    def paint(picture, time):
        picture[:] = round(255 * time / seconds)

    return paint


def times_of(frames, seconds):
    """The times that `clock` painted."""
    return [float(np.asarray(frame).mean()) / 255 * seconds for frame in frames]


def event(picture, time):
    """Half a second of red in a corner."""
    if 33.1 <= time < 33.6:
        picture[10:20, 10:20] = (200, 40, 40)


def moving(picture, time):
    """A green thing that never stands still, and the event."""
    x = int(4 + time * 5) % 50
    picture[30:38, x : x + 8] = (20, 200, 20)
    event(picture, time)


def noisy(picture, time):
    """Camera noise, and the event."""
    noise = np.random.default_rng(int(time * 10)).normal(0, 8, picture.shape)
    picture[:] = np.clip(picture + noise, 0, 255)
    event(picture, time)


def cuts(picture, time):
    """Four scenes as different as can be, and the event in one."""
    picture[:] = ((250, 250, 250), (10, 10, 10), (90, 90, 90), (20, 20, 240))[int(time // 15)]
    event(picture, time)


def sees_event(frames):
    """Whether a frame is red in the corner."""
    return any(
        (np.asarray(frame)[12:18, 12:18].astype(int) @ [1, -1, 0]).mean() > 40 for frame in frames
    )


@pytest.mark.parametrize("paint", [event, moving, noisy, cuts])
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("avi", "mpeg4")])
@pytest.mark.fast_cases(2)
def test_keyframes_see_half_a_second_in_a_minute_that_uniform_frames_miss(
    tmp_path, paint, suffix, codec
):
    name = write_video(tmp_path / f"a.{suffix}", 60, paint=paint, codec=codec)
    uniform = read_frames(tmp_path, name, "s:1", VideoSampling("uniform", 8), LIMIT)
    keyframes = read_frames(tmp_path, name, "s:1", VideoSampling("keyframes", 8), LIMIT)
    assert len(uniform) == len(keyframes) == 8
    assert not sees_event(uniform)
    assert sees_event(keyframes)


def test_keyframes_of_a_still_picture_are_spread_as_uniform_ones(tmp_path):
    frames = np.full((100, 12), 7, np.uint8)
    assert frames_of.keyframe_indices(frames, 4) == [12, 37, 62, 87]


def test_keyframes_are_the_same_whatever_block_they_are_compared_in(monkeypatch):
    small = np.random.default_rng(0).integers(0, 255, (50, 12), dtype=np.uint8)
    expected = frames_of.keyframe_indices(small, 8)
    distances = np.square(small[:, None].astype(float) - small[None]).mean(-1)
    usual = 1.25 * np.median(distances[np.arange(49), np.arange(1, 50)]) + 1
    slow = [0]
    while distances[slow].min(0).max() > usual:
        slow.append(int(distances[slow].min(0).argmax()))
    assert expected == frames_of.fill_gaps(set(slow), 50, 8)
    for block in (1, 7, 49, 50):
        monkeypatch.setattr(frames_of, "BLOCK", block)
        assert frames_of.keyframe_indices(small, 8) == expected


def test_uniform_frames_are_the_middles_of_equal_parts_in_order(tmp_path):
    name = write_video(tmp_path / "a.mp4", 20, paint=clock(20))
    found = times_of(read_frames(tmp_path, name, "s:1", VideoSampling("uniform", 5), LIMIT), 20)
    np.testing.assert_allclose(found, [2, 6, 10, 14, 18], atol=0.3)


def test_fps_gives_a_frame_every_so_many_seconds_up_to_the_cap(tmp_path):
    name = write_video(tmp_path / "a.mp4", 20, paint=clock(20))
    found = times_of(read_frames(tmp_path, name, "s:1", VideoSampling("fps", 16, 0.5), LIMIT), 20)
    np.testing.assert_allclose(found, np.arange(0, 20, 2), atol=0.3)
    capped = times_of(read_frames(tmp_path, name, "s:1", VideoSampling("fps", 5, 0.5), LIMIT), 20)
    np.testing.assert_allclose(capped, [2, 6, 10, 14, 18], atol=0.3)


def test_uniform_and_fps_go_by_time_where_frames_are_not_equally_long():
    shown = [0.0, 0.1, 0.2, 0.3, 0.4, 5.0, 9.0]  # the fifth stands for nearly five seconds
    times = [*shown, 10.0]
    assert frames_of.uniform_indices(times, 2) == [4, 5]
    assert frames_of.uniform_indices(times, 1) == [5]
    assert frames_of.fps_indices(times, 0.25, 4) == [0, 4]  # at 0 and 4 s
    assert len(frames_of.uniform_indices(times, 6)) == 6


@pytest.mark.parametrize("sampling", ["uniform", "fps", "keyframes"])
def test_a_video_of_fewer_frames_gives_all_of_them(tmp_path, sampling):
    name = write_video(tmp_path / "a.mp4", 0.3, paint=clock(0.3))
    frames = read_frames(tmp_path, name, "s:1", VideoSampling(sampling, 8, 10), LIMIT)
    np.testing.assert_allclose(times_of(frames, 0.3), [0, 0.1, 0.2], atol=0.02)


X264 = {"x264-params": "keyint=20:open-gop=1:bframes=4"}


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "20"}),
        ("mp4", "libx264", X264),
        ("ts", "libx264", X264),
        ("avi", "mpeg4", {}),
        ("h264", "libx264", {}),
    ],
)
@pytest.mark.parametrize(
    "sampling",
    [VideoSampling("uniform", 7), VideoSampling("fps", 40, 0.5), VideoSampling("keyframes", 7)],
)
@pytest.mark.fast_cases(6)
def test_frames_that_are_sought_are_those_of_decoding_everything(
    tmp_path, suffix, codec, options, sampling, monkeypatch
):
    def paint(picture, time):
        clock(60)(picture, time)
        picture[:24] = np.random.default_rng(int(time * 10)).integers(0, 255, 3)

    name = write_video(tmp_path / f"a.{suffix}", 60, paint=paint, codec=codec, options=options)
    sought = read_frames(tmp_path, name, "s:1", sampling, LIMIT)
    monkeypatch.setattr(
        video, "frames_at", lambda *args, f=video.frames_at: f(*args[:3], args[3][:1], args[4])
    )
    decoded = read_frames(tmp_path, name, "s:1", sampling, LIMIT)
    assert len(sought) == len(decoded) >= 7
    for one, other in zip(sought, decoded):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def write_at(path, milliseconds, codec="libx264", options=None):
    """A clip of frames shown at some times, each of its own grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            picture = np.full((48, 64, 3), 10 + 3 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def begin_later(path, out, milliseconds):
    """The same packets, shown from a time on: an edit list cuts off what is before, in the
    middle of a group of pictures."""
    with (
        av.open(str(path)) as source,
        av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        stream = source.streams.video[0]
        copied = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                shift = int(milliseconds / 1000 / stream.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - shift,
                    packet.dts - shift,
                    copied,
                )
                container.mux(packet)


REGULAR = [40 * number for number in range(60)]
VARIABLE = np.cumsum([0] + [(10, 40, 40, 500)[number * 7 % 4] for number in range(59)]).tolist()


@pytest.mark.parametrize("times", [REGULAR, VARIABLE, [5000 + time for time in REGULAR]])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_uniform_frames_are_those_shown_at_the_middles_whatever_the_clock(tmp_path, name, times):
    """Times that are not even, do not begin at 0, or are not in the order of decoding."""
    write_at(tmp_path / name, times, options={"bf": "3", "g": "25"})
    assert len(check_middles(tmp_path, name)) == 60


@pytest.mark.parametrize("cut", [400, 1500])
def test_what_an_edit_list_cuts_off_is_not_counted(tmp_path, cut):
    write_at(tmp_path / "whole.mp4", REGULAR, options={"bf": "3", "g": "25"})
    begin_later(tmp_path / "whole.mp4", tmp_path / "cut.mp4", cut)
    assert len(check_middles(tmp_path, "cut.mp4")) < 60
    assert len(read_frames(tmp_path, "cut.mp4", "s:1", VideoSampling("keyframes", 5), LIMIT)) == 5


def check_middles(folder, name):
    """That five uniform frames are those on show at the middles of equal parts; the times of all
    that are shown."""
    found = [
        np.asarray(frame)
        for frame in read_frames(folder, name, "s:1", VideoSampling("uniform", 5), LIMIT)
    ]
    with av.open(str(folder / name)) as container:
        shown = list(container.decode(video=0))
        times = [frame.time - shown[0].time for frame in shown]
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in shown]
        end = times[-1] + float(shown[-1].duration * shown[-1].time_base or Fraction(1, 25))
    assert len(found) == 5
    for number, frame in enumerate(found):
        moment = (2 * number + 1) * end / 10
        on_show = [picture for time, picture in zip(times, pictures) if time <= moment + 0.002][-2:]
        assert min(np.abs(picture - frame).mean() for picture in on_show) < 2
    return times


def test_little_of_a_long_video_is_decoded_where_key_frames_allow(tmp_path, monkeypatch):
    name = write_video(tmp_path / "a.mp4", 60, paint=clock(60), options={"g": "10"})
    decoded = []
    enumerated = lambda frames: ((decoded.append(1) or k, frame) for k, frame in enumerate(frames))  # noqa: E731
    monkeypatch.setattr(video, "enumerate", enumerated, raising=False)
    read_frames(tmp_path, name, "s:1", VideoSampling("uniform", 4), LIMIT)
    assert 4 <= len(decoded) <= 4 * 11


@pytest.mark.parametrize("sampling", ["uniform", "keyframes"])
def test_only_the_chosen_frames_of_a_long_video_become_pictures(tmp_path, sampling, monkeypatch):
    name = write_video(tmp_path / "a.mp4", 60, paint=event)
    pictured = []
    monkeypatch.setattr(
        video, "upright", lambda frame, f=video.upright: pictured.append(1) or f(frame)
    )
    read_frames(tmp_path, name, "s:1", VideoSampling(sampling, 8), LIMIT)
    assert len(pictured) == 8


def test_frames_are_turned_upright(tmp_path):
    def paint(picture, time):
        picture[:, :32] = 255

    name = write_video(tmp_path / "a.mp4", 1, paint=paint, rotation=90)
    (frame,) = read_frames(tmp_path, name, "s:1", VideoSampling("uniform", 1), LIMIT)
    assert frame.size == (48, 64)
    # a quarter turn counterclockwise brings the left side down
    assert np.asarray(frame)[40:].mean() > 240
    assert np.asarray(frame)[:24].mean() < 120


def corrupt(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("sampling", ["uniform", "fps", "keyframes"])
@pytest.mark.parametrize("break_it", [corrupt, cut])
def test_a_corrupt_video_is_an_error_that_names_sample_and_file(tmp_path, break_it, sampling):
    name = write_video(tmp_path / "a.mp4", 20, paint=noisy)
    break_it(tmp_path / name)
    with pytest.raises(
        DataError, match=r"^sample s:1: video a.mp4 cannot be read: Invalid data"
    ) as error:
        read_frames(tmp_path, name, "s:1", VideoSampling(sampling, 8), LIMIT)
    assert "\n" not in str(error.value)


def make_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_empty(path):
    """A video stream without a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def write_streams(path, sides, default):
    """A file of several video streams, each a square of one grey; which of them is the default."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in sides]
        for number, (stream, side) in enumerate(zip(streams, sides)):
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            stream.disposition = (
                av.stream.Disposition.default if number == default else av.stream.Disposition(0)
            )
        for _ in range(10):
            for stream, side in zip(streams, sides):
                grey = np.full((side, side, 3), 100, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())


def write_cover(path, video):
    """A picture of a cover, and a video or sound."""
    picture = io.BytesIO()
    Image.new("RGB", (320, 320), "red").save(picture, "PNG")
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 320, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264" if video else "aac", rate=10 if video else 16000)
        if video:
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
        packet = av.Packet(picture.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = cover, 0, 0, True
        container.mux(packet)
        for _ in range(10 if video else 0):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                )
            )
        container.mux(stream.encode())


@pytest.mark.parametrize("sampling", ["uniform", "fps", "keyframes"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("default", [0, 1])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_of_several_streams_the_containers_default_is_read(
    tmp_path, suffix, default, sampling, as_bytes
):
    file = tmp_path / f"a.{suffix}"
    write_streams(file, (64, 96), default)
    frames = read_frames(
        tmp_path,
        file.read_bytes() if as_bytes else file.name,
        "s:1",
        VideoSampling(sampling, 2),
        LIMIT,
    )
    assert {frame.size for frame in frames} == {((64, 64), (96, 96))[default]}


def test_the_picture_of_a_cover_is_no_video(tmp_path):
    write_cover(tmp_path / "a.mp4", video=True)
    frames = read_frames(tmp_path, "a.mp4", "s:1", VideoSampling("uniform", 2), LIMIT)
    assert {frame.size for frame in frames} == {(64, 64)}
    write_cover(tmp_path / "b.mp4", video=False)
    with pytest.raises(
        DataError, match="video b.mp4 has no video stream, only a picture of its cover"
    ):
        read_frames(tmp_path, "b.mp4", "s:1", VideoSampling(), LIMIT)


def test_a_video_of_bytes_is_that_of_its_file_and_its_errors_name_the_sample(tmp_path):
    name = write_video(tmp_path / "a.mp4", 3, paint=clock(3))
    raw = (tmp_path / name).read_bytes()
    for sampling in ("uniform", "fps", "keyframes"):
        options = VideoSampling(sampling, 4, 2)
        one, other = (read_frames(tmp_path, video, "s:1", options, LIMIT) for video in (name, raw))
        assert all(
            np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True)
        )
    for broken in (b"\0" * 64, PLAYLIST, raw[: len(raw) // 2]):
        with pytest.raises(
            DataError, match=f"^sample s:1: video of {len(broken):,} bytes cannot be read"
        ):
            read_frames(tmp_path, broken, "s:1", VideoSampling(), LIMIT)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/a.mp4\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("empty.avi", make_empty, "video empty.avi has no frames"),
        ("sound.mp4", make_sound, "video sound.mp4 has no video stream"),
        (
            "zero.mp4",
            lambda path: path.write_bytes(b""),
            "video zero.mp4 cannot be read: Invalid data",
        ),
        (
            "text.mp4",
            lambda path: path.write_bytes(b"no video " * 99),
            "video text.mp4 cannot be read: Invalid data",
        ),
        ("list.m3u8", lambda path: path.write_bytes(PLAYLIST), "video list.m3u8 cannot be read"),
        (
            "folder.mp4",
            lambda path: path.mkdir(),
            "video folder.mp4 cannot be read: it is a folder, expected a video",
        ),
        # Opening it would wait for a writer.
        (
            "pipe.mp4",
            lambda path: os.mkfifo(path),
            "video pipe.mp4 cannot be read: it is no ordinary file, expected a video",
        ),
        ("missing.mp4", lambda path: None, "no video missing.mp4 in"),
        ("../out.mp4", lambda path: None, "video ../out.mp4 leaves the image root"),
        ("/etc/passwd", lambda path: None, "video /etc/passwd leaves the image root"),
        (
            "link.mp4",
            lambda path: os.symlink("/etc/passwd", path),
            "video link.mp4 leaves the image root",
        ),
        ("ring.mp4", lambda path: os.symlink(path, path), "video 'ring.mp4' is no path"),
        ("a\0b.mp4", lambda path: None, "video 'a.x00b.mp4' is no path"),
        ("x" * 5000, lambda path: None, "video 'xxx.* is no path"),
        ("http://a.b/c.mp4", lambda path: None, "no video http://a.b/c.mp4 in"),
    ],
)
def test_what_is_no_video_below_the_root_is_an_error_that_names_it(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"^sample s:1: {message}"):
        read_frames(tmp_path, name, "s:1", VideoSampling(), LIMIT)


@pytest.mark.parametrize("sampling", ["uniform", "keyframes"])
def test_frames_of_too_many_pixels_are_refused(tmp_path, sampling):
    name = write_video(tmp_path / "a.mp4", 2)
    with pytest.raises(
        DataError,
        match="sample s:1: video a.mp4 has frames of 3,072 pixels, over the limit of 3,000",
    ):
        read_frames(tmp_path, name, "s:1", VideoSampling(sampling, 8), 3000)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"frmes": 3}, "video: no such key: frmes; expected sampling, frames, fps"),
        (
            {"sampling": "best"},
            "video: sampling is 'best', expected one of uniform, fps, keyframes",
        ),
        ({"frames": 0}, "video: frames is 0, expected a whole number of at least 1"),
        ({"frames": True}, "video: frames is True, expected a whole number of at least 1"),
        ({"fps": True}, "video: fps is True, expected a number above 0"),
        ({"fps": 0}, "video: fps is 0, expected a number above 0"),
        ({"fps": float("nan")}, "video: fps is nan"),
        ([], "video: is a list, expected keys and values"),
    ],
)
def test_wrong_options_are_named(node, message):
    with pytest.raises(DataError, match=message):
        VideoSampling.of(node)


def test_without_pyav_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    name = write_video(tmp_path / "a.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'owlfuse\[video\]'"):
        read_frames(tmp_path, name, "s:1", VideoSampling(), LIMIT)


@pytest.mark.parametrize("sampling", ["uniform", "fps", "keyframes"])
def test_a_video_counts_as_its_frames_and_a_tiled_picture_as_its_views(tmp_path, shapes, sampling):
    write_video(tmp_path / "long.mp4", 2)
    write_video(tmp_path / "short.mp4", 0.3)
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    records = [{"video": "long.mp4"}, {"video": "short.mp4"}, {"image": "wide.png"}]
    chat = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "So."}]
    lines = [json.dumps({**record, "conversations": chat}) + "\n" for record in records]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    options = {"sampling": sampling, "frames": 5, "fps": 2}
    source = LLaVA(str(tmp_path / "a.jsonl"), tile=1.0, video=options)
    chats = ChatData(str(shapes / "tokenizer"), {"a": source}, {})
    chats.bind(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    loaded = [len(chats.load(source[index], source).input_ids) for index in range(3)]
    assert chats.lengths()["a"].tokens.tolist() == loaded
    assert min(loaded) > 10


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.58), (18, 0.75), (1, 1.0)])
@pytest.mark.fast_cases(1)
def test_white_of_an_hdr_frame_is_white(transfer, white):
    """PQ and HLG have it at another number than usual screens."""
    frame = av.VideoFrame(16, 16, "yuv420p10le")
    codes = (round(64 + white * 876), 512, 512)
    for plane, code in zip(frame.planes, codes, strict=True):
        values = np.full(plane.buffer_size // 2, code, np.uint16)
        plane.update(values.tobytes())
    frame.color_trc = transfer
    frame.color_primaries = 1 if transfer == 1 else 9
    frame.colorspace = 1 if transfer == 1 else 9
    frame.color_range = 1
    assert min(video.upright(frame).getpixel((4, 4))) > 245
