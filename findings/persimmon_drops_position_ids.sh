#!/usr/bin/env bash
# transformers 5.23.0: packed rows are told to attention by position_ids that begin anew (flash attention finds the
# boundaries in them; DataCollatorWithFlattening makes such rows). Llama's layers hand them on to the attention function.
# Persimmon's name them in their signature and keep them: the function sees none, and packed samples see each other.
# Seen: llama: [0, 1, 0, 1] / persimmon: None
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PersimmonConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward


seen = {}


def note(module, *args, position_ids=None, **kwargs):
    seen[module.config.model_type] = None if position_ids is None else position_ids[0].tolist()
    return sdpa_attention_forward(module, *args, **kwargs)


AttentionInterface.register("note", note)
sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
for config in (LlamaConfig(**sizes), PersimmonConfig(**sizes)):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="note")
    model(torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
print(seen)
assert seen == {"llama": [0, 1, 0, 1], "persimmon": None}
PY
