#!/usr/bin/env bash
# peft 0.21.2: merging a LoRA adapter of a tied head adds its update twice. With ensure_weight_tying=True the head
# and the input embedding each get an adapter, with common factors, over one and the same weight; merge_and_unload
# merges both into it, and the merged model has other logits than the adapter had. Without the option the update is
# added once, but reaches the input embedding as well. Warnings speak of "complications", with the option, too.
# Seen: change of the weight / update: 2.0 with ensure_weight_tying, 1.0 without; logits move both times
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 peft==0.21.2
venv/bin/python -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
ids = torch.arange(8)[None]
for tying, expected in ((True, 2.0), (False, 1.0)):
    torch.manual_seed(0)
    lora = LoraConfig(
        r=2, lora_alpha=2, target_modules=["lm_head"], init_lora_weights=False, ensure_weight_tying=tying
    )
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    head = model.get_output_embeddings()
    before, update = head.base_layer.weight.detach().clone(), head.get_delta_weight("default")
    with torch.no_grad():
        logits = model(ids).logits
        merged = model.merge_and_unload()
        moved = (merged(ids).logits - logits).abs().max().item()
    times = ((merged.lm_head.weight - before) / update).median().item()
    print(f"ensure_weight_tying={tying}: change of the weight / update: {times:.1f}, logits move by {moved:.2f}")
    assert round(times, 2) == expected and moved > 0.1
PY
