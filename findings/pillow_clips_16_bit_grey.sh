#!/usr/bin/env bash
# Pillow 13.0.0 against opencv-python-headless 5.0.0.93: a 16-bit grey PNG (X-rays, depth, microscopes) becomes
# nearly all white with Image.convert("RGB"): values are cut off at 255, not scaled to 8 bits, and nothing is said.
# OpenCV's default reader divides by 256. A 16-bit colour PNG is scaled by Pillow as well, so that only grey pictures
# are hit.
# Seen: grey 0, 8192, 16384, 65535: Pillow [0, 255, 255, 255], OpenCV [0, 32, 64, 255] / colour: [0, 32, 64, 255]
# both
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy
venv/bin/python - <<'PY'
import cv2
import numpy as np
from PIL import Image

grey = np.array([[0, 8192, 16384, 65535]], np.uint16)
cv2.imwrite("grey.png", grey)
cv2.imwrite("colour.png", np.stack([grey] * 3, -1))
for name, expected in (("grey", [0, 255, 255, 255]), ("colour", [0, 32, 64, 255])):
    picture = Image.open(f"{name}.png")
    pillow = np.asarray(picture.convert("RGB"))[0, :, 0].tolist()
    opencv = cv2.imread(f"{name}.png")[0, :, 0].tolist()
    print(f"{name} {grey[0].tolist()}: Pillow (mode {picture.mode}) {pillow}, OpenCV {opencv}")
    assert pillow == expected and opencv == [0, 32, 64, 255]
PY
