#!/usr/bin/env bash
# transformers 5.23.0: a model that went through Trainer is saved with "use_cache": false, also without gradient
# checkpointing: TrainingArguments.use_cache is False by default, and Trainer writes it into the model's configuration
# for good. Whoever loads the folder and calls the model gets no past_key_values any more, without a word; only
# generate() still has a cache, from its own generation_config.json.
# Seen: use_cache before training: True / in the saved config.json: False / past_key_values: None
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
venv/bin/python - <<'PY'
import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config)
before = model.config.use_cache
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}]
trainer = Trainer(model, TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True), train_dataset=rows)
trainer.train()
trainer.save_model("saved")
after = json.load(open("saved/config.json"))["use_cache"]
cache = LlamaForCausalLM.from_pretrained("saved")(torch.arange(8)[None]).past_key_values
print(f"use_cache before training: {before} / in the saved config.json: {after} / past_key_values: {cache}")
assert (before, after, cache) == (True, False, None)
PY
