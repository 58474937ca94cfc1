"""Pictures and videos of a conversation: read within limits, and laid out as a processor takes them.

Whoever sends a picture decides how much memory it takes; the limits are checked before anything is decoded.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
from PIL import Image, ImageOps, UnidentifiedImageError

from ..models.flamingo import FlamingoProcessor


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# frames are kept in memory together, and no vision tower of a video model reads more
MAX_FRAME_SIDE = 1080


@dataclass(frozen=True)
class MediaLimits:
    """
    What a picture or video may take.

    Args:
        image_pixels: of a picture or of one frame of a video.
        video_pixels: of all frames that have to be decoded to read a video; they bound the time it takes.
        pictures: pictures and frames of one request.
        total_pixels: of the pictures and frames of one request, which are in memory together.
    """

    image_pixels: int = 40_000_000
    video_pixels: int = 20_000_000_000
    pictures: int = 128
    total_pixels: int = 150_000_000


def open_image(source: bytes | str | Path, name: str, limits: MediaLimits = MediaLimits()) -> Image.Image:
    """
    The picture in RGB, upright.

    Args:
        source: an encoded picture, or the path of one.
        name: what to call it in an error.

    Raises:
        ValueError: naming it, if it cannot be decoded or has too many pixels.
    """
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"{name} cannot be read as an image: there is no such file.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
            _check_pixels(image.size, name, limits)
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except _TooLarge:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read as an image: it is no {', '.join(IMAGE_FORMATS)}.") from error
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, ... on damaged files
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def read_frames(
    source: bytes | str | Path, name: str, num_frames: int, limits: MediaLimits = MediaLimits()
) -> list[Image.Image]:
    """
    Evenly spaced frames of a video in RGB, the first one included; all of them if it has fewer than `num_frames`.

    Args:
        source: an encoded video, or the path of one.
        name: what to call it in an error.

    Raises:
        ValueError: naming it, if it cannot be decoded or decoding it exceeds the limits.
    """
    if not 1 <= num_frames <= limits.pictures:
        raise ValueError(f"{num_frames} frames are wanted of {name}; ask for 1 to {limits.pictures}.")
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"{name} cannot be read as a video: there is no such file.")
    try:
        # packets are counted first: containers state no or wrong numbers of frames
        with _open_video(source) as container:
            stream = container.streams.video[0]
            size = (stream.width, stream.height)
            total = sum(1 for packet in container.demux(stream) if packet.size)
        _check_pixels(size, name, limits)
        if total * size[0] * size[1] > limits.video_pixels:
            raise _TooLarge(
                f"{name} has {total} frames of {size[0]}x{size[1]}, in all more than {limits.video_pixels} pixels; "
                "send a shorter or smaller one."
            )
        count = min(num_frames, total)
        wanted = {i * total // count for i in range(count)}
        frames = []
        with _open_video(source) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    # a stream may change its size on the way
                    _check_pixels((frame.width, frame.height), name, limits)
                    image = frame.to_image()
                    image.thumbnail((MAX_FRAME_SIDE, MAX_FRAME_SIDE))
                    frames.append(image)
                if index >= total:
                    break
    except _TooLarge:
        raise
    except Exception as error:  # PyAV's errors have no common parent but Exception
        raise ValueError(f"{name} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{name} cannot be read as a video: it has no frames.")
    return frames


def image_part(image: Image.Image) -> dict:
    """A picture as part of a message."""
    return {"type": "image", "image": image}


def video_part(frames: list[Image.Image]) -> dict:
    """Frames of a video as part of a message."""
    return {"type": "video", "video": frames}


def fit_media(messages: Sequence[dict], processor) -> list[dict]:
    """
    The messages with pictures and videos as `processor` takes them.

    A Flamingo tells pictures from videos by their frames only, so beside a video a picture becomes one of one frame.
    Others take the frames of a video as pictures, one after the other.
    """
    takes_videos = isinstance(processor, FlamingoProcessor)
    any_video = any(part["type"] == "video" for message in messages for part in message["content"])

    def fit(part: dict) -> list[dict]:
        if takes_videos and any_video and part["type"] == "image":
            return [video_part([part["image"]])]
        if not takes_videos and part["type"] == "video":
            return [image_part(frame) for frame in part["video"]]
        return [part]

    return [
        {"role": message["role"], "content": [fitted for part in message["content"] for fitted in fit(part)]}
        for message in messages
    ]


class _TooLarge(ValueError):
    """Decodable, but more than the limits allow."""


def _check_pixels(size: tuple[int, int], name: str, limits: MediaLimits) -> None:
    width, height = size
    if width * height > limits.image_pixels:
        raise _TooLarge(f"{name} has {width}x{height} pixels, more than {limits.image_pixels}; send a smaller one.")


def _open_video(source: bytes | str | Path):
    readable: BinaryIO | str = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    return av.open(readable, metadata_errors="ignore")
