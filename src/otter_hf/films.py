"""The one reader of films: encoded films and given frames become PIL images in RGB (single pictures: `pictures`).

* **Given as** bytes, a binary file, a path, a `http(s)` or `file` URL, a `data:` URI or base64 text of an encoded
  film; or as its frames: a list of pictures, or an array or tensor `(F, H, W, C)` or `(F, C, H, W)`, by the rules of
  `pictures`.
* **Containers**: those of `film_decoders.CONTAINERS`, with codecs of its `CODECS`, decoded with FFmpeg (PyAV); GIF,
  WebP and other pictures with Pillow. A film is read from its own bytes alone: what names other files or addresses
  (playlists, references) is not followed.
* **Which frames**: of an encoded film 16 that are evenly spaced in time, the first one included, or `num_frames` of
  them; `fps=` takes one every `1 / fps` seconds; `do_sample_frames=False` takes all. At a constant rate frame `i` of
  `n` is the one of index `i * total // n`; at a variable rate the one that is shown at that time, again if it is shown
  for long. A film with fewer frames than asked for gives all it has. Frames that are given are taken as they are,
  unless `num_frames` is. Nothing relies on a number of frames or a duration in the header.
* **Orientation** stored in the film (telephones) is applied, as OpenCV and decord do.
* **Memory and time**: only frames that are wanted are kept and converted, and how many pixels they may have together
  is limited (`FilmLimits`). Each frame's size is checked before it is decoded. Where a container has an index,
  decoding starts at the keyframe in front of each wanted frame; of others, and where that fails, all are decoded.
"""

import math
from numbers import Integral, Real
from typing import Any

from PIL import Image

from .film_decoders import DEFAULT_LIMITS, FilmLimits, open_film
from .pictures import ImageError, ImageTooLarge, array_range, is_array, is_list, read_image, to_numpy, undecoded


DEFAULT_NUM_FRAMES = 16
# how films begin: MOV and MP4 with a box of these, others with these bytes
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
# AVIF, and HEIC, which Pillow reads with a plugin
_PICTURES = tuple(b"ftyp" + brand for brand in (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix"))
_STARTS = (b"\x1aE\xdf\xa3", b"FLV", b"OggS", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"G@", b"0&\xb2u")
FILM_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv", ".asf"),
    ".gif",
)


def check_sampling(num_frames: int | None, fps: float | None, do_sample_frames: bool | None) -> None:
    """Raise ValueError for numbers that mean nothing, and for options that contradict each other."""
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1
    ):
        raise ValueError(f"num_frames must be a whole number of at least 1, got {num_frames!r}.")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < math.inf):
        raise ValueError(f"fps must be a number above 0, got {fps!r}.")
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames} and fps={fps} were given: choose one.")
    if do_sample_frames is False and (num_frames is not None or fps is not None):
        given = f"num_frames={num_frames}" if fps is None else f"fps={fps}"
        raise ValueError(f"do_sample_frames=False takes all frames, but {given} was given: choose one.")


def read_video(
    video: Any,
    name: str = "video",
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    do_sample_frames: bool | None = None,
    default_num_frames: int | None = None,
    limits: FilmLimits = DEFAULT_LIMITS,
    **image_options: Any,
) -> list[Image.Image]:
    """
    The frames of a film in RGB, by the rules of this module.

    Args:
        video: see the module; also a mapping with `bytes` or `path`, as `datasets` has it.
        name: what to call it in an error.
        num_frames, fps, do_sample_frames: which frames, see the module.
        default_num_frames: of an encoded film, where none of these is given; else 16.
        limits: what it may take.
        image_options: for `pictures.read_image`, where the frames are given.

    Raises:
        ImageError: a ValueError of one sentence that names it, if it cannot be read or exceeds the limits.
        ValueError: for sampling options that mean nothing.
    """
    check_sampling(num_frames, fps, do_sample_frames)
    video = undecoded(video)
    if is_array(video) or is_list(video) or isinstance(video, Image.Image):
        return _given_frames(video, name, num_frames, fps, image_options)
    with open_film(video, name, limits) as film:
        count = num_frames or default_num_frames or DEFAULT_NUM_FRAMES
        targets = film.targets(count, fps, do_sample_frames is not False)
        wanted = len(film) if targets is None else len(targets)
        shrunk = min(
            1.0,
            (limits.max_side or math.inf) / max(film.width, film.height),
            (limits.short_side or math.inf) / min(film.width, film.height),
        )
        if wanted * film.width * film.height * shrunk**2 > limits.kept_pixels:
            raise ImageTooLarge(
                f"{name} is too large: {wanted} frames of {film.width} x {film.height} are more than "
                f"{limits.kept_pixels} pixels; ask for fewer frames (num_frames, fps)."
            )
        return [_shrunk(frame.image(), limits) for frame in film.pick(targets)]


def _shrunk(image: Image.Image, limits: FilmLimits) -> Image.Image:
    if limits.max_side is not None:
        image.thumbnail((limits.max_side, limits.max_side))
    short, side = min(image.size), limits.short_side
    if side is not None and side < short:
        image = image.resize([int(side * length / short) for length in image.size], Image.Resampling.BICUBIC)
    return image


def is_film(data: bytes) -> bool:
    """Whether encoded bytes are a film by how they begin; animated pictures are pictures."""
    if data[4:8] in _BOXES:
        return data[4:12] not in _PICTURES
    return data.startswith(_STARTS) or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")


def _given_frames(video: Any, name: str, num_frames: int | None, fps: float | None, image_options: dict) -> list:
    if fps is not None:
        raise ImageError(f"{name} cannot be read as a video: fps={fps} needs times, and frames alone have none.")
    if is_array(video) and not is_list(video):
        video = to_numpy(video, name)
        if video.ndim != 4:
            raise ImageError(
                f"{name} cannot be read as a video: its shape is {tuple(video.shape)}; give (F, H, W, C) or "
                "(F, C, H, W)."
            )
    elif isinstance(video, Image.Image):
        raise ImageError(f"{name} cannot be read as a video: it is one picture; give a list of frames.")
    if not len(video):
        raise ImageError(f"{name} cannot be read as a video: it has no frames.")
    frames = list(video)
    # whether numbers are 0 to 1 shows in all frames together
    if all(map(is_array, frames)) and len({str(frame.dtype) for frame in frames}) == 1:
        lows, highs = zip(*(array_range(frame, name) for frame in frames), strict=True)
        image_options["number_range"] = (min(lows), max(highs))
    if num_frames is not None and num_frames < len(frames):
        frames = [frames[i * len(frames) // num_frames] for i in range(num_frames)]
    return [read_image(frame, f"{name}, frame {i}", **image_options) for i, frame in enumerate(frames)]
