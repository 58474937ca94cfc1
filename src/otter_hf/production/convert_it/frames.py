"""Frames of videos by time."""

from collections.abc import Iterator

from PIL import Image

from ...files import fetched
from ...films import open_film
from ...storage import AnyPath
from .base import LeftOut


def frames_by_second(path: AnyPath) -> Iterator[tuple[int, Image.Image]]:
    """Yields `(second, frame)`: the first frame of each second of a video, counted from its first frame.

    Frame times are the container's, whatever its nominal rate says; at a constant whole rate these are frames 0, rate,
    2 * rate, and so on. A second without frames is passed over. Frames are decoded one by one, in RGB, upright and
    full size.

    Raises:
        LeftOut: of kind `"damaged"`, if there is no video in the file, or where it cannot be decoded any further.
    """
    due, second = 0, None
    try:
        with fetched(path) as file, open_film(file, "it") as film:
            for frame in film.frames():
                second = int(frame.time)
                if second >= due:
                    yield second, frame.image()
                    due = second + 1
    except FileNotFoundError:
        raise LeftOut("missing", f"there is no file {path}") from None
    except ValueError as error:
        where = "" if second is None else f", behind second {second}"
        raise LeftOut("damaged", f"{str(error).rstrip('.')}{where}") from None
