"""Small videos for tests."""

from pathlib import Path

import av
from PIL import Image


def write_video(path: Path, num_frames: int, size: tuple[int, int] = (32, 24)) -> Path:
    """A film that turns from black to red."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(num_frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (i * 255 // num_frames, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
