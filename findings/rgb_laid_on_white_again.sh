#!/usr/bin/env bash
# pillow 13.0.0, transformers 5.23.0: a palette picture with a transparent colour still names it in
# `info["transparency"]` after convert("RGB"). transformers' convert_to_rgb, with which image processors start, takes
# that for an alpha channel and lays the RGB picture on white: all pixels of that colour turn white, although the
# caller has flattened the picture already.
# Seen: after convert("RGB"): (0, 0, 0) / after convert_to_rgb: (255, 255, 255) / with info emptied: (0, 0, 0)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile pillow==13.0.0 transformers==5.23.0
venv/bin/python - <<'PY'
import io

from PIL import Image
from transformers.image_transforms import convert_to_rgb

picture = Image.new("P", (2, 1), 0)
picture.putpalette([0, 0, 0, 200, 0, 0])
picture.putpixel((1, 0), 1)
file = io.BytesIO()
picture.save(file, "PNG", transparency=0)
rgb = Image.open(file).convert("RGB")
assert rgb.mode == "RGB"
seen = [rgb.getpixel((0, 0)), tuple(convert_to_rgb(rgb, return_numpy=True)[0, 0].tolist())]
rgb.info = {}
seen.append(tuple(convert_to_rgb(rgb, return_numpy=True)[0, 0].tolist()))
print('after convert("RGB"): {} / after convert_to_rgb: {} / with info emptied: {}'.format(*seen))
assert seen == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]
PY
