#!/usr/bin/env bash
# transformers 5.23.0: MptForCausalLM takes an MPT configuration with qk_ln and computes without it.
# MptAttentionConfig has the field, stores it and shows it, but no layer is built; the stored q_ln and k_ln weights
# are reported as unexpected at most, and the logits are those of another model. MPT-1B-RedPajama-200B is such a
# model.
# Seen: configured qk_ln: True / parameters named *_ln: []
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import torch
from transformers import MptConfig, MptForCausalLM

logits = []
for qk_ln in (True, False):
    config = MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, attn_config={"qk_ln": qk_ln})
    torch.manual_seed(0)
    model = MptForCausalLM(config).eval()
    with torch.no_grad():
        logits.append(model(torch.arange(8)[None]).logits)
    names = [name for name, _ in model.named_parameters() if "q_ln" in name or "k_ln" in name]
    print("configured qk_ln:", model.config.attn_config.qk_ln, "/ parameters named *_ln:", names)
    assert model.config.attn_config.qk_ln == qk_ln and not names
print("largest difference of the logits with and without:", (logits[0] - logits[1]).abs().max().item())
assert torch.equal(*logits)
PY
