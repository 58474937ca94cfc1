#!/usr/bin/env bash
# torch 2.13.0 on a CPU: float8_e4m3fn saturates, infinity included, where float8_e4m3fnuz of the same width gives NaN
# and float8_e5m2 infinity: what has overflowed looks like 448 afterwards. (torch 2.11.0+cu130, CPU and H200: NaN from 470
# on, so that a cache whose scale is frozen gives NaN there, and here does not.)
# Seen: e4m3fn [448.0, 448.0, 448.0], e4m3fnuz [nan, nan, nan], e5m2 [448.0, inf, inf]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/python - <<'PY'
import math

import torch


values = torch.tensor([470.0, 1e6, math.inf])
seen = {
    kind: values.to(getattr(torch, f"float8_{kind}")).float().tolist() for kind in ("e4m3fn", "e4m3fnuz", "e5m2")
}
print(seen)
assert seen["e4m3fn"] == [448.0] * 3
assert all(map(math.isnan, seen["e4m3fnuz"]))
assert seen["e5m2"] == [448.0, math.inf, math.inf]
PY
