"""Pictures and videos of a conversation: read within limits, and laid out as a processor takes them.

Whoever sends a picture decides how much memory it takes; the limits are checked before anything is decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..films import FilmLimits, read_video
from ..models.chat_processing import map_parts, media_parts_of
from ..models.flamingo import FlamingoProcessor
from ..pictures import FORMATS, fetch, path_of_url, read_image


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
        text_characters: of all texts of one request.
    """

    image_pixels: int = 40_000_000
    video_pixels: int = 20_000_000_000
    pictures: int = 128
    total_pixels: int = 150_000_000
    text_characters: int = 500_000

    @property
    def padded_frames(self) -> int:
        """Pictures and films of a request times the frames of the longest, which each takes in the model's input."""
        return 4 * self.pictures


def open_image(source: bytes | str | Path, name: str, limits: MediaLimits = MediaLimits()) -> Image.Image:
    """
    The picture in RGB, by the rules of `otter_hf.pictures`, within the limits.

    Args:
        source: an encoded picture, or the path of one.
        name: what to call it in an error.

    Raises:
        ValueError: naming it, if it cannot be decoded or has too many pixels.
    """
    source = source if isinstance(source, bytes) else Path(source)  # a text is a path here, never an address
    return read_image(source, name, max_pixels=limits.image_pixels, formats=FORMATS)


def read_frames(
    source: bytes | str | Path | list[bytes],
    name: str,
    num_frames: int,
    limits: MediaLimits = MediaLimits(),
    check: Callable[[], None] | None = None,
) -> list[Image.Image]:
    """
    Frames of a video in RGB, evenly spaced in time, by the rules of `otter_hf.films`, within the limits.

    Args:
        source: an encoded video, or the path of one; or its frames, as encoded pictures, of which those that are read
            may have as many pixels as one picture.
        name: what to call it in an error.
        check: called for each frame that is decoded; what it raises ends the work.

    Raises:
        ValueError: naming it, if it cannot be decoded or decoding it exceeds the limits.
    """
    if not 1 <= num_frames <= limits.pictures:
        raise ValueError(f"{num_frames} frames are wanted of {name}; ask for 1 to {limits.pictures}.")
    if isinstance(source, list):
        pixels = limits.image_pixels // max(1, min(num_frames, len(source)))
        return read_video(source, name, num_frames=num_frames, max_pixels=pixels, formats=FORMATS)
    source = source if isinstance(source, bytes) else Path(source)
    film_limits = FilmLimits(
        frame_pixels=limits.image_pixels, film_pixels=limits.video_pixels, max_side=MAX_FRAME_SIDE, check=check
    )
    return read_video(source, name, num_frames=num_frames, limits=film_limits)


def is_url(name: str) -> bool:
    """Whether it is a http(s) address."""
    return name.lower().startswith(("http://", "https://"))


def local_path(name: str) -> Path:
    """
    The path that a person at this machine names: with `~` for a home folder, or as the `file://` address that a
    desktop hands over.

    Raises:
        ValueError: for the home of somebody who is not known here.
    """
    if name.lower().startswith("file://"):
        return Path(path_of_url(name))
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be read: there is no home folder of that name.") from error


def local_source(name: str) -> Path | bytes:
    """
    What the person at this machine names, for `open_image` and `read_frames`: a path, see `local_path`, or the bytes
    at a http(s) address. Never for what strangers name.

    Raises:
        ValueError: naming it, if it cannot be fetched.
    """
    if not is_url(name):
        return local_path(name)
    try:
        return fetch(name)
    except ValueError as error:
        raise ValueError(f"{error}.") from error


def image_part(image: Image.Image) -> dict:
    """A picture as part of a message."""
    return {"type": "image", "image": image}


def video_part(frames: list[Image.Image]) -> dict:
    """Frames of a video as part of a message."""
    return {"type": "video", "video": frames}


def fit_media(messages: Sequence[dict], processor, limits: MediaLimits | None = None) -> list[dict]:
    """
    The messages with videos as `processor` takes them: those of other families than Flamingo's take the frames of a
    video as pictures, one after the other.

    Raises:
        ValueError: for media that padded to the longest of them are above the limits.
    """
    if isinstance(processor, FlamingoProcessor):
        if limits is not None:
            _check_padding([part.get("video") or [part] for part in media_parts_of(messages)], limits)
        return list(messages)

    def fit(part: dict) -> list[dict]:
        is_video = isinstance(part, dict) and part.get("type") == "video"  # what is no part the processor refuses
        return [image_part(frame) for frame in part["video"]] if is_video else [part]

    return map_parts(messages, fit)


def _check_padding(media: list[list], limits: MediaLimits) -> None:
    longest = max(map(len, media), default=0)
    if len(media) * longest > limits.padded_frames:
        raise ValueError(
            f"messages hold {len(media)} pictures and videos, of which each takes as much as the longest, {longest} "
            f"frames: more than the {limits.padded_frames} frames that a request may take; send fewer of them, or ask "
            'for fewer frames with chat_template_kwargs: {"num_frames": ...}.'
        )
