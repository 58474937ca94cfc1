#!/usr/bin/env bash
# transformers 5.23.0: _init_weights of a model class outside the library is never called for modules that have no
# parameters of their own, such as a block that closes the gate of its child. The same class does so inside the
# library: PreTrainedModel.is_custom_code() decides by where the class was defined. Nothing is said, in __init__ or
# from_pretrained.
# Seen: gate of a fresh model: 16.0 / with is_custom_code() overridden to say False: 0.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import torch
from transformers import PreTrainedConfig, PreTrainedModel


class Config(PreTrainedConfig):
    model_type = "gated"


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(4, 4)


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.block = Block()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.ones_(module.weight)
        if isinstance(module, Block):  # comes after its children
            torch.nn.init.zeros_(module.gate.weight)


class Declared(Model):
    @classmethod
    def is_custom_code(cls):
        return False


gates = [cls(Config()).block.gate.weight.sum().item() for cls in (Model, Declared)]
print(f"gate of a fresh model: {gates[0]} / with is_custom_code() overridden to say False: {gates[1]}")
assert gates == [16.0, 0.0]
PY
