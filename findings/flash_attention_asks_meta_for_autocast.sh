#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: a float32 model on the meta device, as one counts operations or memory with, cannot
# pass through flash attention even where a kernel is registered for it: transformers asks whether autocast is on for the
# query's device, and torch answers for meta (as for any device without autocast) with an error in place of False.
# Seen: cpu False; meta RuntimeError: unknown device type for autocast ...
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import torch
from transformers.integrations.flash_attention import get_target_dtype


seen = {}
for device in ("cpu", "meta"):
    layer = torch.nn.Linear(4, 4, device=device)
    layer.config = None
    try:
        seen[device] = get_target_dtype(torch.empty(1, 1, 2, 4, device=device), layer)
    except RuntimeError as error:
        seen[device] = str(error)
print(torch.is_autocast_enabled("cpu"), seen)
assert seen["cpu"] == torch.float32 and "unknown device type for autocast" in seen["meta"]
PY
