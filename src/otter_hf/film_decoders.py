"""Decoders of films, frame by frame: FFmpeg (PyAV) for containers, Pillow for animated pictures. See `films`."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from .pictures import FORMATS, TURNS, ImageError, ImageTooLarge, check_size, open_source, read_image


logger = logging.get_logger(__name__)

# FFmpeg's names of demuxers; none of them opens anything but the bytes it is given
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
# and of decoders
CODECS = frozenset(
    "h264 hevc vvc vp8 vp9 libvpx libvpx-vp9 libdav1d av1 mpeg4 mpeg2video mpeg1video mjpeg h263 flv wmv1 wmv2 wmv3 "
    "vc1 theora prores dnxhd ffv1 huffyuv ffvhuff utvideo rawvideo png dvvideo vp6 vp6f msmpeg4 msmpeg4v2 msmpeg4v1 "
    "svq3 cinepak".split()
)
# of FFmpeg's demuxers, those that know where their keyframes are
_INDEXED = ("mov", "matroska")
# milliseconds of a frame that states none, as browsers show it
_FRAME_DURATION = 100


@dataclass(frozen=True)
class FilmLimits:
    """
    What a film may take.

    Args:
        frame_pixels: of one frame; the default is a little more than 8K has.
        film_pixels: of all its frames, wanted or not, which bound the time that decoding takes; None for any number.
        frames: that it may have.
        kept_pixels: of all wanted frames together, shrunk.
        max_side: longer sides are shrunk to it; None keeps all frames as they are.
        short_side: shorter sides are shrunk to it, bicubic, as a processor's `shortest_edge`.
        check: called for each frame that is decoded, wanted or not; what it raises ends the work.
    """

    frame_pixels: int = 40_000_000
    film_pixels: int | None = None
    frames: int = 1_000_000
    kept_pixels: int = 1_000_000_000
    max_side: int | None = None
    short_side: int | None = None
    check: Callable[[], None] | None = None


DEFAULT_LIMITS = FilmLimits()


class Frame(NamedTuple):
    """A decoded frame: when it is shown, in seconds from the first one, and what makes an image of it."""

    time: Fraction
    image: Callable[[], Image.Image]


def open_film(source: Any, name: str = "video", limits: FilmLimits = DEFAULT_LIMITS) -> "Film":
    """
    An encoded film, to be used in a `with` block.

    Raises:
        ImageError: if it is none, has no frames, or more pixels than the limits.
    """
    file = open_source(source, name, "a video")
    try:
        film = _PillowFilm if _is_picture(file) else _FFmpegFilm
        return film(file, name, limits)
    except BaseException:
        file.close()
        raise


def _is_picture(file: BinaryIO) -> bool:
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # damaged: its reader will say so
        return True
    finally:
        file.seek(0)


class Film:
    """
    An encoded film: `len(film)` frames of `width` x `height`, as stored.

    Attributes:
        ticks: when each frame is shown, ascending, in `time_base` seconds.
        end: when the last one is over, in the same.
    """

    time_base: Fraction
    width: int
    height: int
    ticks: list[int]
    end: int

    def __init__(self, file: BinaryIO, name: str, limits: FilmLimits):
        self.file, self.name, self.limits = file, name, limits
        try:
            self._scan()
        except ImageError:
            raise
        except Exception as error:  # neither PyAV's nor Pillow's errors have a common parent but Exception
            raise self.unreadable(error) from error
        if not self.ticks:
            raise self.unreadable("it has no frames")
        self._check_pixels(len(self))

    def __len__(self) -> int:
        return len(self.ticks)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def _check_pixels(self, num_frames: int) -> None:
        limit = self.limits.film_pixels
        if limit is not None and num_frames * self.width * self.height > limit:
            raise ImageTooLarge(
                f"{self.name} is too large: {num_frames} frames of {self.width} x {self.height} are more than {limit} "
                "pixels; send a shorter or smaller one."
            )
        if num_frames > self.limits.frames:
            raise ImageTooLarge(
                f"{self.name} is too large: it has more than {self.limits.frames} frames; send a shorter one."
            )

    def _check_frame(self, width: int, height: int) -> None:
        if self.limits.check is not None:
            self.limits.check()
        check_size(width, height, self.name, self.limits.frame_pixels)

    def unreadable(self, reason: object) -> ImageError:
        """The error to raise for a film that cannot be decoded for this reason."""
        return ImageError(f"{self.name} cannot be read as a video: {str(reason).rstrip('.')}.")

    def _scan(self) -> None:
        """Sets the attributes."""
        raise NotImplementedError

    def _frames(self) -> Iterator[tuple[int, Callable[[], Image.Image]]]:
        """The ticks of each frame in order, and what makes an upright image of it in RGB."""
        raise NotImplementedError

    def frames(self) -> Iterator[Frame]:
        """All frames in order; only those whose `image` is called are converted."""
        try:
            for ticks, image in self._frames():
                yield Frame((ticks - self.ticks[0]) * self.time_base, image)
        except (ImageError, GeneratorExit):
            raise
        except Exception as error:
            raise self.unreadable(error) from error

    def targets(self, num_frames: int, fps: float | None, sample: bool) -> list[Fraction] | None:
        """The times of the frames to take, in seconds from the first; None for all there are."""
        duration = (self.end - self.ticks[0]) * self.time_base
        if fps is not None:
            step = 1 / Fraction(fps)
            num_frames = max(1, math.ceil((duration - self._rounding()) / step))
        else:
            step = duration / num_frames
        if not sample or num_frames >= len(self):
            return None
        return [i * step for i in range(num_frames)]

    def _rounding(self) -> Fraction:
        """How far times may be off, in seconds: containers that count milliseconds round them."""
        coarse = self.end - self.ticks[0] <= 8 * len(self)
        return 0 * self.time_base if coarse else 2 * self.time_base

    def pick(self, targets: Sequence[Fraction] | None) -> Iterator[Frame]:
        """The frames shown at the given times, which ascend; None for all."""
        if targets is None:
            yield from self.frames()
            return
        rounding, waiting, shown = self._rounding(), list(reversed(targets)), None
        for frame in self.frames():
            while waiting and shown is not None and frame.time > waiting[-1] + rounding:
                waiting.pop()
                yield shown
            if not waiting:
                return
            shown = frame
        if shown is not None:
            yield from [shown] * len(waiting)


class _PillowFilm(Film):
    """GIF, WebP, animated PNG; a still picture is a film of one frame."""

    time_base = Fraction(1, 1000)

    def _scan(self):
        self.ticks, self.end = [], 0
        with Image.open(self.file, formats=FORMATS) as image:
            self.width, self.height = image.size
            check_size(*image.size, self.name, self.limits.frame_pixels)
            num_frames = getattr(image, "n_frames", 1)
            self._check_pixels(num_frames)
            for number in range(num_frames):
                image.seek(number)
                self._check_frame(*image.size)
                if image.format in ("WEBP", "AVIF"):  # whose durations come with the pixels
                    image.load()
                self.ticks.append(self.end)
                self.end += round(image.info.get("duration") or _FRAME_DURATION)

    def _frames(self):
        self.file.seek(0)
        with Image.open(self.file, formats=FORMATS) as image:
            for number, ticks in enumerate(self.ticks):
                image.seek(number)
                self._check_frame(*image.size)
                image.load()
                # a copy: the next frame changes the image
                yield ticks, partial(read_image, image.copy(), self.name)


class _FFmpegFilm(Film):
    """What PyAV decodes."""

    def _scan(self):
        with self._open() as container:
            stream = self._stream(container)
            self.width, self.height, self.time_base = stream.width, stream.height, stream.time_base
            if not self.width or not self.height:
                limit = self.limits.frame_pixels
                raise ImageTooLarge(
                    f"{self.name} is too large, or has no frames: a frame may have at most {limit} pixels."
                )
            check_size(self.width, self.height, self.name, self.limits.frame_pixels)
            packets = []
            for packet in container.demux(stream):
                # frames behind the end of an edit list are in the file and not shown
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.duration, packet.is_keyframe))
                if len(packets) % 1000 == 0:
                    self._check_frame(self.width, self.height)
                    self._check_pixels(len(packets))
            indexed = any(name in container.format.name.split(",") for name in _INDEXED)
        if any(packet[0] is None for packet in packets):
            packets, indexed = [(index, 1, False) for index in range(len(packets))], False
            self.time_base = 1 / Fraction(stream.guessed_rate or stream.average_rate or 25)
        packets.sort(key=lambda packet: packet[0])
        self.ticks = [packet[0] for packet in packets]
        # ticks of the keyframes. One is sought by the time it is shown at: by its decoding time, which lies before,
        # FFmpeg goes to the keyframe before (PyAV 18.1, H.264 in mp4), and twice as much is decoded
        self._keys = [pts for pts, _, key in packets if key and indexed]
        gaps = [later - earlier for earlier, later in pairwise(self.ticks)]
        last = (packets[-1][1] if packets else None) or (sum(gaps) // len(gaps) if gaps else 1)
        self.end = self.ticks[-1] + max(last, 1) if packets else 0

    def _frames(self):
        self.file.seek(0)
        with self._open() as container:
            for index, frame in enumerate(container.decode(self._stream(container))):
                self._check_frame(frame.width, frame.height)
                known = self.ticks[min(index, len(self) - 1)]
                yield known if frame.pts is None else frame.pts, partial(_upright, frame)

    def pick(self, targets):
        targets, done = None if targets is None else list(targets), 0
        if targets and self._keys and self._keys[0] <= self.ticks[0]:
            try:
                for frame in self._sought(targets):
                    yield frame
                    done += 1
            except (ImageError, GeneratorExit):
                raise
            except Exception as error:  # of PyAV, for a keyframe that is none: what comes from the start may do better
                logger.debug(f"{self.name} is read without its index: {error}")
        if targets is None or done < len(targets):
            yield from super().pick(targets if targets is None else targets[done:])

    def _sought(self, targets: Sequence[Fraction]) -> Iterator[Frame]:
        """The frames shown at the given times, each decoded from the keyframe in front of it; fewer if one fails."""
        rounding = self._rounding()
        shown = [
            self.ticks[bisect_right(self.ticks, self.ticks[0] + (time + rounding) / self.time_base) - 1]
            for time in targets
        ]
        self.file.seek(0)
        with self._open() as container:
            stream, frames = self._stream(container), None
            frame: Any = None
            for tick in shown:
                key = self._keys[bisect_right(self._keys, tick) - 1]
                if frames is None or frame.pts < key:
                    container.seek(key, stream=stream)
                    frames, frame = self._decoded(container, stream, set(shown)), None
                while frame is None or frame.pts != tick:
                    frame = next(frames, None)
                    if frame is None or frame.pts is None or frame.pts > tick or frame.is_corrupt:
                        return
                    self._check_frame(frame.width, frame.height)
                yield Frame((tick - self.ticks[0]) * self.time_base, partial(_upright, frame))

    @staticmethod
    def _decoded(container: Any, stream: Any, wanted: set[int]) -> Iterator:
        """Frames from where the container stands; those that no other frame needs only if they are wanted."""
        for packet in container.demux(stream):
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def _open(self):
        import av

        # a file object, so that no name is taken for an address; and nothing else may be opened
        options = {
            "format_whitelist": ",".join(CONTAINERS),
            "protocol_whitelist": "none",
            "codec_whitelist": ",".join(sorted(CODECS)),
        }
        try:
            return av.open(
                _Nameless(self.file),
                options={"max_pixels": str(self.limits.frame_pixels)},  # for each frame, and while FFmpeg probes
                container_options=options,
                metadata_errors="ignore",
                io_open=_refuse_to_open,
            )
        except av.error.ArgumentError as error:  # what FFmpeg says of a demuxer that is not on the list
            raise self.unreadable(f"it is none of the containers {', '.join(CONTAINERS)}") from error

    def _stream(self, container):
        import av

        cover = av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & cover), None)
        if stream is None:
            sound = "sound only" if container.streams.audio else "no video stream"
            raise self.unreadable(f"it has {sound}")
        codec = stream.codec_context.codec.name if stream.codec_context else None
        if codec not in CODECS:
            raise self.unreadable(f"its codec {codec or 'of an unknown kind'} is none of those that are decoded here")
        return stream


def _refuse_to_open(url: str, flags: int, options: dict) -> None:
    raise PermissionError("a film is read from its own bytes alone")


class _Nameless:
    """A file without its name, by which FFmpeg would guess a container."""

    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _upright(frame: Any) -> Image.Image:
    """A frame of PyAV in RGB, turned as its display matrix says."""
    image = frame.to_image()
    turn = TURNS.get(_orientation(frame))
    return image if turn is None else image.transpose(turn)


def _orientation(frame: Any) -> int:
    """The EXIF number of a frame's display matrix; 1, upright, where it has none or turns by no quarter."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return 1
    import numpy as np

    # x' = a x + c y, y' = b x + d y, with y downwards
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5] / 65536
    size = max(abs(a), abs(b)) or 1.0
    return _EXIF_NUMBERS.get(tuple(round(float(number / size), 1) for number in (a, b, c, d)), 1)


_EXIF_NUMBERS: dict[tuple[float, ...], int] = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}
