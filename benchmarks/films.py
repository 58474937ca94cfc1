"""
Frames of a film for training: only those asked for, found by keyframes, beside decoding and converting all of them.

    python benchmarks/films.py [--seconds 10] [--frames 8] [--repeats 5]

The film is made on the spot: 1280 x 720 at 25 frames a second, H.264 as x264 encodes it by default (keyframes at most
250 frames apart) and with a keyframe each second, as films made for streaming have them.
"""

import argparse
import io
from functools import partial

import av
import numpy as np
from _common import compare, report

from otter_hf.films import FilmLimits, open_film, read_video


def make_film(seconds: int, keyint: int) -> bytes:
    """Noise of blocks that moves, so that neither a still film nor pure noise is measured."""
    generator = np.random.default_rng(0)
    ground = np.kron(generator.integers(0, 255, (45, 80, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("h264", rate=25, options={"x264-params": f"keyint={keyint}"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(25 * seconds):
            frame = np.roll(ground, (2 * number, 5 * number), (0, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def asked_for(film: bytes, frames: int) -> list:
    return read_video(film, num_frames=frames, limits=FilmLimits(short_side=224))


def all_of_them(film: bytes, frames: int) -> list:
    """What a data set of extracted frames does first: every frame as a picture; then those that are wanted."""
    with open_film(film) as opened:
        pictures = [frame.image() for frame in opened.frames()]
    chosen = [pictures[i * len(pictures) // frames] for i in range(frames)]
    return [picture.resize((398, 224)) for picture in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for keyint in (250, 25):
        film = make_film(arguments.seconds, keyint)
        title = f"{arguments.frames} frames of {arguments.seconds} s, keyframes {keyint} frames apart"
        sides = (partial(side, film, arguments.frames) for side in (asked_for, all_of_them))
        rows.append(compare(title, *sides, arguments.repeats))
    report("films", f"every frame decoded and converted, PyAV {av.__version__}", rows)


if __name__ == "__main__":
    main()
