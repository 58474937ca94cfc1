#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: what `modules_to_save` trains is a deep copy with a configuration of its own, so
# `set_attn_implementation` on the model changes every layer but the trained one; nothing is said.
# Seen: the original of the layer and the others eager, the copy that is computed sdpa
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PY'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes))
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1.self_attn"]))
model.set_attn_implementation("eager")
used = {
    name.removeprefix("base_model.model.model.layers."): module.config._attn_implementation
    for name, module in model.named_modules()
    if type(module).__name__ == "LlamaAttention"
}
print(used)
assert used == {
    "0.self_attn": "eager",
    "1.self_attn.original_module": "eager",
    "1.self_attn.modules_to_save.default": "sdpa",
}
PY
