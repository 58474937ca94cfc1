#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: from_pretrained(FOLDER, output_loading_info=True) of a PEFT adapter loads the base
# model, then the adapter, and hands out what the adapter's loading told in place of the base's. A base that lacks a tensor
# is filled up at random, and `missing_keys` is empty; the same base loaded by itself names it.
# Seen: base alone: 1 missing / base under an adapter: 0 missing, and the weight is another one at each load
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig


sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
model = AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
model.save_pretrained("base")
model.name_or_path = "base"
adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], base_model_name_or_path="base"))
adapter.peft_config["default"].base_model_name_or_path = "base"
adapter.save_pretrained("adapter")

name = "model.layers.0.mlp.up_proj.weight"
tensors = load_file("base/model.safetensors")
del tensors[name]
save_file(tensors, "base/model.safetensors", {"format": "pt"})

_, alone = AutoModelForCausalLM.from_pretrained("base", output_loading_info=True)
loads = [AutoModelForCausalLM.from_pretrained("adapter", output_loading_info=True) for _ in range(2)]
under = loads[0][1]
weights = [dict(model.named_parameters())[name] for model, _ in loads]
differ = not torch.equal(*weights)
print("alone:", sorted(alone["missing_keys"]), "under an adapter:", sorted(under["missing_keys"]), "differ:", differ)
assert list(alone["missing_keys"]) == [name] and not under["missing_keys"] and differ
PY
