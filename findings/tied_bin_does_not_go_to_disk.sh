#!/usr/bin/env bash
# transformers 5.23.0: a model with tied embeddings whose pytorch_model.bin holds the tied weight once, as the
# library itself wrote it, loads on the CPU and with its layers on disk, but not when its head goes to disk: KeyError
# 'lm_head.weight'. The same weights as model.safetensors load with the same device map.
# Seen: .bin: KeyError 'lm_head.weight' / .safetensors: loaded, logits move by 0.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
venv/bin/python - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
model.save_pretrained("safetensors")
config.save_pretrained("bin")
weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
torch.save(weights, "bin/pytorch_model.bin")
device_map, ids = {"model": "disk", "lm_head": "disk"}, torch.arange(8)[None]
outcomes = {}
with torch.no_grad():
    expected = model(ids).logits
    assert torch.equal(LlamaForCausalLM.from_pretrained("bin")(ids).logits, expected)
    for folder in ("bin", "safetensors"):
        try:
            loaded = LlamaForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder="offload")
            moved = (loaded(ids).logits - expected).abs().max().item()
            outcomes[folder] = f"loaded, logits move by {moved}"
        except KeyError as error:
            outcomes[folder] = f"KeyError {error}"
print(f".bin: {outcomes['bin']} / .safetensors: {outcomes['safetensors']}")
assert outcomes == {"bin": "KeyError 'lm_head.weight'", "safetensors": "loaded, logits move by 0.0"}
PY
