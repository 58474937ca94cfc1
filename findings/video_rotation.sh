#!/usr/bin/env bash
# PyAV 18.1.0 against opencv-python-headless 5.0.0.93: the same phone film, stored lying with a display matrix that
# turns it, comes out upright from OpenCV and lying from PyAV. Both sit on FFmpeg, whose command line turns frames by
# itself; its libraries only report the angle (`frame.rotation` in PyAV), and OpenCV's reader applies it.
# Seen: stored 64 x 32, to be shown 32 x 64 / PyAV: 64 x 32, rotation -90 / OpenCV: 32 x 64
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile av==18.1.0 opencv-python-headless==5.0.0.93 numpy
venv/bin/python - <<'PY'
import struct

import av
import cv2
import numpy as np

with av.open("film.mp4", "w") as film:
    stream = film.add_stream("mpeg4", rate=5)
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
    for i in range(5):
        film.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 64, 3), 40 * i, np.uint8), format="rgb24")))
    film.mux(stream.encode())
# what a phone writes when held upright: a quarter turn in the display matrix of the track header (ISO/IEC 14496-12)
data = bytearray(open("film.mp4", "rb").read())
matrix = data.find(b"tkhd") + 44
assert struct.unpack_from(">9i", data, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
struct.pack_into(">9i", data, matrix, 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
open("film.mp4", "wb").write(data)

frame = next(av.open("film.mp4").decode(video=0))
height, width, _ = cv2.VideoCapture("film.mp4").read()[1].shape
lying = frame.to_ndarray(format="rgb24").shape[1::-1]
print(f"PyAV: {lying[0]} x {lying[1]}, rotation {frame.rotation}")
print(f"OpenCV: {width} x {height}")
assert (*lying, frame.rotation) == (64, 32, -90)
assert (width, height) == (32, 64)
PY
