#!/usr/bin/env bash
# transformers 5.23.0 with PyAV 18.1.0, load_video(num_frames=8): frames are chosen by the count in the file's header.
# An mp4 that was trimmed without encoding anew (telephones, ffmpeg -c copy) keeps the frames in front, hidden by an
# edit list: the header counts them, the decoder leaves them out. Half of the frames asked for are missing, without a
# word, and the metadata name eight. A WebM has no count in its header, and is refused as too short.
# Seen: 40 frames in the header, 20 shown: 4 frames, numbers 0 5 10 15; metadata: 8 / WebM: ValueError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 pillow==12.0.0 av==18.1.0
venv/bin/python -W ignore - <<'PY'
import av
import numpy as np
from transformers.video_utils import load_video


def write(name, codec, hidden):
    with av.open(name, "w") as out:
        stream = out.add_stream(codec, rate=25, options={"x264-params": "keyint=10:scenecut=0:bframes=0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pictures = [np.full((48, 64, 3), 40 + 4 * number, np.uint8) for number in range(40)]
        packets = [p for x in pictures for p in stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24"))]
        for packet in [*packets, *stream.encode()]:
            step = int(1 / packet.time_base / 25)
            packet.pts, packet.dts = packet.pts - hidden * step, packet.dts - hidden * step
            out.mux(packet)


write("trimmed.mp4", "h264", 20)
write("film.webm", "vp9", 0)
with av.open("trimmed.mp4") as film:
    counts = film.streams.video[0].frames, sum(1 for _ in film.decode(video=0))
frames, metadata = load_video("trimmed.mp4", num_frames=8)
numbers = [round((frame.mean() - 40) / 4) - 20 for frame in frames]
try:
    webm = len(load_video("film.webm", num_frames=8)[0])
except ValueError as error:
    webm = type(error).__name__
print(f"in the header, shown: {counts} / frames: {numbers}, metadata: {len(metadata.frames_indices)} / WebM: {webm}")
assert counts == (40, 20)
assert numbers == [0, 5, 10, 15] and len(metadata.frames_indices) == 8
assert webm == "ValueError"
PY
