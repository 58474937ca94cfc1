"""The rules of `otter_hf.films`, in the processor, in chat and server, and in convert-it."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from otter_hf import OtterProcessor
from otter_hf.films import FilmLimits, is_film, open_film, read_video
from otter_hf.pictures import FORMATS, ImageError
from otter_hf.production.convert_it.base import LeftOut
from otter_hf.production.convert_it.frames import frames_by_second
from otter_hf.serving.media import MediaLimits, read_frames
from otter_hf.testing.otter import build_tokenizer


WIDTH, HEIGHT = 48, 32


def frame_image(number):
    """Grey that tells the number of the frame (times 8), with a white square in the upper left corner."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (number * 8,) * 3)
    image.paste("white", (0, 0, 16, 16))
    return image


def number_of(image):
    """The number of the frame, whichever way it is turned: its middle is grey."""
    return round(np.asarray(image.convert("L"))[image.height // 2, image.width // 2] / 8)


def film(container="mp4", codec="mpeg4", times=20, rate=5, rotation=0, options=None):
    """An encoded film; `times` is a number of frames, or the ticks of `1 / rate` seconds when each is shown."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options={"qscale": "1"} if codec == "mpeg4" else {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        stream.codec_context.time_base = 1 / Fraction(rate)
        for number, tick in enumerate(range(times) if isinstance(times, int) else times):
            frame = av.VideoFrame.from_image(frame_image(number))
            frame.pts, frame.time_base = tick, 1 / Fraction(rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def numbers(source, **options):
    return [number_of(frame) for frame in read_video(source, **options)]


@pytest.fixture(scope="module")
def processor():
    """One that leaves pixels as they are."""
    image_processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False)
    return OtterProcessor(image_processor, OtterProcessor.prepare_tokenizer(build_tokenizer()))


def seen(processor, video, **options):
    """The frames `(F, H, W, 3)` that the processor makes of a video."""
    batch = processor(text="<image>x", videos=video, return_tensors="pt", **options)
    return (batch["pixel_values"][0, 0].permute(0, 2, 3, 1) * 255).round().numpy().astype(np.uint8)


CONTAINERS = {
    "mp4": ("mp4", "mpeg4", None),
    "fragmented mp4": ("mp4", "h264", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "mov": ("mov", "h264", None),
    "mkv": ("matroska", "h264", None),
    "webm": ("webm", "libvpx-vp9", None),
    "avi": ("avi", "mpeg4", None),
    "ts": ("mpegts", "mpeg2video", None),
    "flv": ("flv", "flv", None),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
def test_every_container_gives_the_same_frames(kind, rate, tmp_path, processor):
    container, codec, options = CONTAINERS[kind]
    data = film(container, codec, 24, rate, options=options)
    expected = [i * 24 // 5 for i in range(5)]
    path = tmp_path / "film"  # a name that tells nothing
    path.write_bytes(data)
    assert numbers(data, num_frames=5) == numbers(path, num_frames=5) == expected
    assert [number_of(Image.fromarray(frame)) for frame in seen(processor, str(path), num_frames=5)] == expected
    assert [number_of(frame) for frame in read_frames(data, "film", 5)] == expected
    with open_film(data) as opened:
        assert len(opened) == 24


@pytest.mark.parametrize("rotation, corner", [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (-90, (1, 0))])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_stored_rotation_is_applied_everywhere(rotation, corner, container, tmp_path, processor):
    """`rotation` is counterclockwise; the corner is where the white square goes, as (x, y)."""
    data = film(container, times=2, rotation=rotation)
    (tmp_path / "film.mp4").write_bytes(data)
    size = (HEIGHT, WIDTH) if rotation % 180 else (WIDTH, HEIGHT)
    from_convert_it = [frame for _, frame in frames_by_second(tmp_path / "film.mp4")]
    from_processor = [Image.fromarray(frame) for frame in seen(processor, str(tmp_path / "film.mp4"))]
    for frame in [*read_video(data), *read_frames(data, "x", 2), *from_convert_it, *from_processor]:
        assert frame.size == size
        x, y = (4 if side == 0 else length - 5 for side, length in zip(corner, size, strict=True))
        assert frame.getpixel((x, y))[0] > 200 and frame.getpixel((size[0] - 1 - x, size[1] - 1 - y))[0] < 60


def noise_film(container, codec, options):
    """40 frames of noise that moves."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        for number in range(40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 3 * number, 1), format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "container, codec, options",
    [
        ("mp4", "mpeg4", {}),
        ("matroska", "h264", {"x264-params": "keyint=6:open-gop=1"}),
        ("mp4", "h264", {"x264-params": "keyint=100:bframes=3"}),
        ("mp4", "h264", {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}),
    ],
    ids=["keyframes", "open groups", "one keyframe", "no keyframes"],
)
def test_frames_found_by_keyframes_are_those_of_reading_all(container, codec, options):
    data = noise_film(container, codec, options)
    for wanted in (3, 9, 30):
        found = [np.asarray(frame) for frame in read_video(data, num_frames=wanted)]
        with open_film(data) as opened:
            every = [np.asarray(frame.image()) for frame in opened.frames()]
        assert np.array_equal(found, [every[i * 40 // wanted] for i in range(wanted)])


def test_a_keyframe_is_sought_itself_not_the_one_before():
    data = noise_film("mp4", "h264", {"x264-params": "keyint=10:scenecut=0:bframes=3"})
    with open_film(data) as opened:
        opened.file.seek(0)
        with opened._open() as container:
            stream, landed = opened._stream(container), []
            for key in opened._keys:
                container.seek(key, stream=stream)
                landed.append(next(container.demux(stream)).pts)
    assert landed == opened._keys and len(landed) == 4


def test_a_mirrored_film_is_mirrored_back():
    data = bytearray(film(times=1))
    matrix = data.index(b"tkhd") + 44  # of the box of the track, in version 0
    data[matrix : matrix + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, WIDTH << 16, 0, 1 << 30)
    (frame,) = read_video(bytes(data))
    assert frame.getpixel((WIDTH - 5, 4))[0] > 200 > frame.getpixel((4, 4))[0]


def test_frames_are_even_in_time_not_in_number():
    # nine frames in the first second, one for the other nine
    data = film("matroska", "h264", [*range(9), 9, 90], rate=10)
    assert numbers(data, num_frames=5) == [0, 9, 9, 9, 9]
    assert numbers(data, num_frames=10) == [0, *[9] * 9]
    assert numbers(data, fps=1)[:3] == [0, 9, 9]
    assert numbers(data, num_frames=16) == list(range(11))


def test_how_many_frames(processor):
    data = film()  # 20 frames in 4 seconds
    assert numbers(data) == [i * 20 // 16 for i in range(16)]
    assert numbers(data, fps=1) == [0, 5, 10, 15]
    assert numbers(data, fps=0.5) == [0, 10]
    assert numbers(data, fps=100) == numbers(data, do_sample_frames=False) == list(range(20))
    assert numbers(film(times=3)) == [0, 1, 2]
    assert len(seen(processor, data, fps=1)) == 4
    assert len(seen(processor, data, do_sample_frames=False)) == 20
    for options, message in (
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
        ({"num_frames": -1}, "num_frames must be a whole number of at least 1, got -1"),
        ({"num_frames": 2.5}, "num_frames must be a whole number"),
        ({"fps": 0}, "fps must be a number above 0, got 0"),
        ({"fps": float("nan")}, "fps must be a number above 0"),
        ({"fps": 1, "num_frames": 4}, "num_frames=4 and fps=1 were given: choose one"),
        ({"do_sample_frames": False, "fps": 1}, "do_sample_frames=False takes all frames, but fps=1 was given"),
    ):
        with pytest.raises(ValueError, match=message):
            seen(processor, data, **options)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", *{"AVIF"}.intersection(FORMATS)])
def test_animated_pictures_are_films(format, processor):
    frames = [frame_image(number * 5) for number in range(4)]
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(format, {})
    # the second is shown for long
    frames[0].save(
        buffer, format, save_all=True, append_images=frames[1:], duration=[100, 700, 100, 100], loop=0, **options
    )
    data = buffer.getvalue()
    assert not is_film(data), "by itself it is a picture"
    assert numbers(data) == [0, 5, 10, 15]
    assert numbers(data, num_frames=3) == [0, 5, 5]
    assert numbers(data, fps=3) == [0, 5, 5]
    for given in (io.BytesIO(data), {"bytes": data, "path": None}):
        assert [number_of(Image.fromarray(frame)) for frame in seen(processor, given)] == [0, 5, 10, 15]
    (single,) = read_video(jpeg(frames[1]))
    assert number_of(single) == 5


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_frames_that_are_given(processor):
    frames = [frame_image(number) for number in range(6)]
    array = np.stack([np.asarray(frame) for frame in frames])  # (F, H, W, C)
    for video in (frames, tuple(frames), array, list(array), torch.from_numpy(array), array.transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(seen(processor, video), array)
    np.testing.assert_array_equal(seen(processor, array / 255), array)
    np.testing.assert_array_equal(seen(processor, array, num_frames=3), array[::2])
    # whether numbers are 0 to 1 is seen in all frames together: the first is black
    with pytest.raises(ValueError, match=r"videos\[0\]\[0\], frame 0 .* go from 0.0 to 255.0, and floats must be"):
        seen(processor, array.astype(np.float32))
    dark_first = np.stack([np.full((8, 8, 3), level, np.uint16) for level in (257, 65535)])
    assert seen(processor, dark_first)[:, 0, 0, 0].tolist() == [1, 255]
    for video, message in (
        (frames[0], "it is one picture; give a list of frames"),
        ([], "no frames|0 videos"),
        (array[0], r"its shape is \(32, 48, 3\); give \(F, H, W, C\)"),
    ):
        with pytest.raises(ValueError, match=message):
            seen(processor, video)
    with pytest.raises(ValueError, match="fps=1 needs times, and frames alone have none"):
        seen(processor, frames, fps=1)


def test_several_films(processor):
    array = np.stack([np.asarray(frame_image(number)) for number in range(4)])
    data, text = film(times=4), ["<image>x", "<image>x"]
    one = processor(text="<image>x", videos=array[:2], return_tensors="pt")["pixel_values"]
    for videos in (
        [array[:2], array[2:]],
        np.stack([array[:2], array[2:]]),  # (N, F, H, W, C)
        [[array[:2]], [array[2:]]],
        [list(array[:2]), list(array[2:])],
        [torch.from_numpy(array[:2]), torch.from_numpy(array[2:])],
    ):
        batch = processor(text=text, videos=videos, return_tensors="pt")["pixel_values"]
        assert batch.shape[:3] == (2, 1, 2) and torch.equal(batch[:1], one) and not torch.equal(batch[1:], one)
    for videos in ([data, data], [io.BytesIO(data), io.BytesIO(data)], [[data], [data]]):
        batch = processor(text=text, videos=videos, return_tensors="pt")["pixel_values"]
        assert batch.shape[:3] == (2, 1, 4) and torch.equal(batch[0], batch[1])
    second = processor(text=["x", "<image>x"], videos=[None, array[:2]], return_tensors="pt")["pixel_values"]
    assert torch.equal(second[1:], one)


def sound():
    """A film without pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def playlists(path):
    """What would make FFmpeg open `path`, were it let."""
    return {
        "concat": f"ffconcat version 1.0\nfile '{path}'\n",
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{path}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.parametrize("kind", ["concat", "hls", "sdp"])
def test_a_film_opens_nothing_but_itself(kind, tmp_path, processor):
    (tmp_path / "other.ts").write_bytes(film("mpegts", "mpeg2video", 5))
    data = playlists(tmp_path / "other.ts")[kind].encode()
    for name in ("list.txt", "list.m3u8", "list.ffconcat", "list.sdp"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match="x cannot be read as a video: .*none of the containers|Invalid data"):
            read_video(tmp_path / name, "x")
    with pytest.raises(ImageError, match="x cannot be read as a video"):
        read_video(data, "x")
    # a text is a path or an address, never an instruction to FFmpeg
    for text in (f"concat:{tmp_path}/other.ts", f"file:{tmp_path}/other.ts", "list:" + str(tmp_path)):
        with pytest.raises(ImageError, match="x cannot be read as a video: (there is no such file|it is no file)"):
            read_video(text, "x")


def test_what_is_no_film_is_refused_in_a_sentence(tmp_path, processor):
    data = film()
    for source, message in (
        (sound(), "it has sound only"),
        (b"nonsense", "cannot be read as a video"),
        (b"", "cannot be read as a video"),
        (data[: len(data) // 2], "cannot be read as a video"),
        ("gone.mp4", "there is no such file"),
    ):
        for read in (read_video, lambda source, name: seen(processor, source)):
            with pytest.raises(ValueError, match=rf"{message}.*\.$"):
                read(source, "x")
    (tmp_path / "sound.mp4").write_bytes(sound())
    with pytest.raises(LeftOut, match="it has sound only"):
        list(frames_by_second(tmp_path / "sound.mp4"))


def test_limits_are_looked_at_before_frames_are_kept():
    data, pixels = film(), WIDTH * HEIGHT
    for limits, message in (
        (FilmLimits(frame_pixels=pixels - 1), "a frame may have at most 1535 pixels"),
        (FilmLimits(film_pixels=20 * pixels - 1), "20 frames of 48 x 32 are more than 30719 pixels"),
        (FilmLimits(kept_pixels=4 * pixels - 1), "4 frames of 48 x 32 are more than 6143 pixels; ask for fewer"),
    ):
        with pytest.raises(ImageError, match=f"x is too large.*{message}"):
            read_video(data, "x", num_frames=4, limits=limits)
    assert len(read_video(data, num_frames=4, limits=FilmLimits(kept_pixels=4 * pixels))) == 4
    small = read_video(data, num_frames=4, limits=FilmLimits(kept_pixels=pixels, max_side=24))
    assert {frame.size for frame in small} == {(24, 16)}
    with pytest.raises(ValueError, match="200 frames are wanted of x; ask for 1 to 128"):
        read_frames(data, "x", 200, MediaLimits())
