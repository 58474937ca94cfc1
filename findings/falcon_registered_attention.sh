#!/usr/bin/env bash
# transformers 5.23.0: an attention function registered with AttentionInterface serves Llama, Persimmon and most others
# by its name. Falcon's layers look the name up in a table of their own, and building the model ends in a KeyError.
# Seen: llama: runs / falcon: KeyError 'mine'
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, FalconConfig, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward


AttentionInterface.register("mine", sdpa_attention_forward)
sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
seen = {}
for config in (LlamaConfig(intermediate_size=8, **sizes), FalconConfig(**sizes)):
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="mine")
        model(torch.tensor([[1, 2, 3]]))
        seen[config.model_type] = "runs"
    except Exception as error:
        seen[config.model_type] = f"{type(error).__name__} {error}"
print(seen)
assert seen == {"llama": "runs", "falcon": "KeyError 'mine'"}
PY
