#!/usr/bin/env bash
# transformers 5.23.0: Fuyu configurations of 2023 (Fuyu-8B and its fine-tunes, OtterHD) are read with a RoPE base of
# 10000 instead of 25000. Version 4.35 wrote into text_config only what differed from Persimmon's defaults, and the
# base at the top level; version 5 dropped that default, and reads the top level only where there is no text_config
# at all.
# Seen: rope_theta with text_config: 10000.0 / without: 25000.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import json
import os

from transformers import AutoConfig

theta = []
for name, extra in {"with": {"text_config": {"model_type": "persimmon"}}, "without": {}}.items():
    os.mkdir(name)
    json.dump({"model_type": "fuyu", "rope_theta": 25000.0} | extra, open(f"{name}/config.json", "w"))
    theta.append(AutoConfig.from_pretrained(name).text_config.rope_parameters["rope_theta"])
print("rope_theta with text_config:", theta[0], "/ without:", theta[1])
assert theta == [10000.0, 25000.0]
PY
