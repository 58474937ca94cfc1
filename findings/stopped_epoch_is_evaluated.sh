#!/usr/bin/env bash
# transformers 5.23.0: a callback that stops training after one of four steps (a signal, a time limit) ends the epoch
# as a whole one: with eval_strategy and save_strategy "epoch" a quarter of an epoch is evaluated, written as a
# checkpoint and counts for load_best_model_at_end and early stopping.
# Seen: stopped at step 1 of 4: evaluated at epoch [0.25], checkpoint-1 is the best model
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
HF_HOME=$dir/home venv/bin/python - <<'PY'
from pathlib import Path
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


rows = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 4
args = TrainingArguments(
    "out", per_device_train_batch_size=1, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch",
    load_best_model_at_end=True, report_to="none", use_cpu=True, disable_tqdm=True,
)
trainer = Trainer(Model(), args, train_dataset=rows, eval_dataset=rows, callbacks=[Stop()])
trainer.train()
evaluated = [entry["epoch"] for entry in trainer.state.log_history if "eval_loss" in entry]
best = trainer.state.best_model_checkpoint
print(f"stopped at step {trainer.state.global_step} of 4: evaluated at epoch {evaluated}, best model {best}")
assert evaluated == [0.25] and Path(best).name == "checkpoint-1"
PY
