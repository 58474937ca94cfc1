#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0: TrainingArguments(fp16=True, use_cpu=True) is taken without a word, and the
# forward pass computes in float32: no autocast is entered, and there is no GradScaler. bf16=True on the same CPU does
# compute in bfloat16. Whoever tries a float16 recipe on a CPU first has tried another one.
# Seen: fp16: torch.float32, scaler None / bf16: torch.bfloat16
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
venv/bin/python - <<'PY'
import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, labels=None):
        out = self.layer(x)
        self.computed_in = out.dtype
        return {"loss": out.float().square().mean(), "logits": out}


def train(**precision):
    model = Model()
    rows = [{"x": torch.tensor([1.0]), "labels": torch.tensor(0)}]
    arguments = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True, **precision)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return model.computed_in, trainer.accelerator.scaler


half, scaler = train(fp16=True)
brain, _ = train(bf16=True)
print(f"fp16: {half}, scaler {scaler} / bf16: {brain}")
assert (half, scaler, brain) == (torch.float32, None, torch.bfloat16)
PY
