#!/usr/bin/env bash
# transformers 5.23.0: a model whose checkpoint names are converted while loading (Fuyu) is saved under the original
# names, by default. Trainer's resume_from_checkpoint hands that file to load_state_dict(strict=False), under the names
# of the modules: not one tensor fits, a warning says so, and training goes on with the weights it began with.
# load_best_model_at_end reads its checkpoint the same way.
# Seen: tensors that fit: 0 of 22 / weights before the first step are those of the checkpoint: False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
venv/bin/python - <<'PY'
import torch
from safetensors.torch import load_file
from transformers import FuyuConfig, FuyuForCausalLM, Trainer, TrainerCallback, TrainingArguments


text = {"model_type": "persimmon", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
sizes = {name: value for name, value in text.items() if name != "model_type"}
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4


def make(seed):
    torch.manual_seed(seed)
    return FuyuForCausalLM(FuyuConfig(text_config=text, patch_size=2, **sizes))


def train(model, steps, callbacks=(), **given):
    arguments = TrainingArguments("out", max_steps=steps, save_steps=1, report_to=[], use_cpu=True, learning_rate=0.1)
    Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks]).train(**given)


class Compare(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


trained, compare = make(0), Compare()
train(trained, 1)
train(make(1), 2, [compare], resume_from_checkpoint="out/checkpoint-1")
stored = load_file("out/checkpoint-1/model.safetensors")
fit = len(stored.keys() & compare.weights.keys())
same = all(torch.equal(tensor, compare.weights[name]) for name, tensor in trained.state_dict().items())
print(f"tensors that fit: {fit} of {len(stored)} / weights before the first step are those of the checkpoint: {same}")
assert fit == 0 and not same
PY
