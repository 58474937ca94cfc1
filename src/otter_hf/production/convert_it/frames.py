"""Frames of videos by time, decoded with PyAV."""

from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image

from .base import LeftOut


def frames_by_second(path: str | Path) -> Iterator[tuple[int, Image.Image]]:
    """Yields `(second, frame)`: the first frame of each second of a video, counted from its first frame.

    Frame times are the container's, whatever its nominal rate says; at a constant whole rate these are frames 0, rate,
    2 * rate, and so on. A second without frames is passed over. Frames are decoded one by one, in RGB and full size.

    Raises:
        LeftOut: of kind `"damaged"`, if there is no video in the file, or where it cannot be decoded any further.
    """
    start, due, second = None, 0, None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise LeftOut("damaged", "there is no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise LeftOut("damaged", "its frames have no time stamps")
                start = frame.pts if start is None else start
                second = int((frame.pts - start) * frame.time_base)
                if second >= due:
                    yield second, frame.to_image()
                    due = second + 1
    except av.FFmpegError as error:
        where = "" if second is None else f" behind second {second}"
        raise LeftOut("damaged", f"cannot be decoded{where} ({error.strerror})") from None
    if start is None:
        raise LeftOut("damaged", "there are no frames in it")
