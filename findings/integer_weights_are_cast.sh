#!/usr/bin/env bash
# transformers 5.23.0: a safetensors file whose weight has the right name and shape but holds integers (as a quantised
# export without its scales does) is loaded into a float model: cast, no warning, nothing in output_loading_info.
# Seen: missing [], mismatched []; the weight is torch.float32 and holds 0 and 1 only
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import logging

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig


sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained("model")
name = "model.layers.0.mlp.up_proj.weight"
tensors = load_file("model/model.safetensors")
tensors[name] = torch.randint(0, 2, tensors[name].shape)
save_file(tensors, "model/model.safetensors", {"format": "pt"})

told = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
model, info = AutoModelForCausalLM.from_pretrained("model", output_loading_info=True)
weight = dict(model.named_parameters())[name]
print({key: sorted(value) for key, value in info.items() if key in ("missing_keys", "mismatched_keys")}, weight.dtype)
print("warnings:", told)
assert not info["missing_keys"] and not info["mismatched_keys"] and not any(name in text for text in told)
assert weight.dtype == torch.float32 and set(weight.flatten().tolist()) <= {0.0, 1.0}
PY
