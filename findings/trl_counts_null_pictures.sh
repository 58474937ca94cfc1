#!/usr/bin/env bash
# TRL 1.16.0: in a parquet or Arrow table all parts of a message have all fields, those a part does not use as null:
# {"type": "image", "text": null, "image": null} is what `datasets` makes of {"type": "image"} once any part of any row
# holds a picture of its own. prepare_multimodal_messages takes the null for a picture that is there, and says that the
# row's images do not fit the places.
# Seen: without the field: filled / with null: ValueError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile trl==1.16.0 transformers==5.23.0 pillow==12.0.0
venv/bin/python - <<'PY'
from PIL import Image
from trl.data_utils import prepare_multimodal_messages


def fill(part):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}]
    try:
        filled = prepare_multimodal_messages(messages, images=[Image.new("RGB", (4, 4))])
        return "filled" if filled[0]["content"][0].get("image") is not None else "empty"
    except ValueError as error:
        return type(error).__name__


without, null = fill({"type": "image"}), fill({"type": "image", "image": None})
print(f"without the field: {without} / with null: {null}")
assert (without, null) == ("filled", "ValueError")
PY
