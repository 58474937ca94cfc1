#!/usr/bin/env bash
# transformers 5.23.0: `generate` on a cache that holds the beginning of the prompt goes on from it, but with prompt lookup
# (or an assistant) reads the whole prompt again on top of its own beginning: other tokens, no warning.
# Seen: greedy equals greedy without a cache; with prompt lookup the cache is longer than the answer, the tokens differ
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=None)).eval()
prompt = torch.randint(3, 64, (1, 20))


def ask(known: int, **settings):
    cache = DynamicCache(config=model.config)
    if known:
        with torch.no_grad():
            model(prompt[:, :known], past_key_values=cache)
    tokens = model.generate(
        prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings
    )
    return tokens[0, 20:].tolist(), cache.get_seq_length()


expected, _ = ask(0)
greedy, length = ask(9)
lookup, length_of_lookup = ask(9, prompt_lookup_num_tokens=3)
fresh, _ = ask(0, prompt_lookup_num_tokens=3)
print(expected, greedy, length, lookup, length_of_lookup)
assert greedy == expected == fresh and length == 27
assert lookup != expected and length_of_lookup > 27
PY
