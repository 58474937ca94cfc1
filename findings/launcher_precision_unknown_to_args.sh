#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0: `accelerate launch --mixed_precision bf16` reaches the Trainer, which
# computes in bfloat16, but TrainingArguments.bf16 stays False. Whoever asks the arguments for the precision (memory
# plans, flash attention, the dtype of adapters) goes wrong; with bf16=True in the arguments both agree.
# Seen: launcher alone: args.bf16 False, a linear layer gives torch.bfloat16 / in the arguments: True, torch.bfloat16
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
cat >train.py <<'PY'
import sys
import torch
from transformers import Trainer, TrainingArguments

seen = []


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        out = self.layer(x)
        seen.append(out.dtype)
        return {"loss": out.float().pow(2).mean()}


options = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
args = TrainingArguments("out", **options, **({"bf16": True} if sys.argv[1:] else {}))
Trainer(Model(), args, train_dataset=[{"x": torch.ones(2), "labels": torch.ones(1)}] * 8).train()
print("args.bf16", args.bf16, "computed in", seen[0])
assert (args.bf16, seen[0]) == (bool(sys.argv[1:]), torch.bfloat16)
PY
export HF_HOME=$dir/home ACCELERATE_USE_CPU=true
venv/bin/accelerate launch --cpu --num_processes 1 --mixed_precision bf16 train.py
venv/bin/accelerate launch --cpu --num_processes 1 --mixed_precision bf16 train.py in_the_arguments
