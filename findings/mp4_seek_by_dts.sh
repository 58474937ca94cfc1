#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg inside), H.264 with B-frames in mp4: an index of packets in decoding order, and a seek backwards to
# the dts that the demuxer itself gave for a keyframe, lands on the keyframe BEFORE it: seeks are by the time a frame is
# shown at, and the dts lies in front of that. A loader that seeks by dts decodes twice the frames, and nothing is wrong.
# Seen: 3 of 3 keyframes missed by dts, 0 of 3 by pts
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile av==18.1.0 numpy==2.4.6
venv/bin/python - <<'PY'
import av
import numpy as np


with av.open("film.mp4", "w") as out:
    stream = out.add_stream("h264", rate=25, options={"x264-params": "keyint=10:scenecut=0:bframes=3"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    for number in range(40):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 3 * number, 1), format="rgb24")))
    out.mux(stream.encode())
with av.open("film.mp4") as film:
    stream = film.streams.video[0]
    keys = [(packet.pts, packet.dts) for packet in film.demux(stream) if packet.is_keyframe and packet.size][1:]
    missed = {"pts": 0, "dts": 0}
    for pts, dts in keys:
        for name, time in (("pts", pts), ("dts", dts)):
            film.seek(time, stream=stream, backward=True)
            missed[name] += next(film.demux(stream)).pts != pts
print(len(keys), "keyframes, missed:", missed)
assert len(keys) == 3 and missed == {"pts": 0, "dts": 3}
PY
