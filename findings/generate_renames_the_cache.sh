#!/usr/bin/env bash
# transformers 5.24.0: generate() hands its cache to the model as `cache`; up to 5.23 it was `past_key_values`. A model
# of one's own (remote code) that names the latter and takes **kwargs, as models should, runs on: each new token is
# computed from the one before alone, and the text is another. All that is said is that the old name is deprecated.
# Seen: tokens with a cache are those without: 5.23.0: True, 5.24.0: False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
cat > show.py <<'PY'
import sys

import torch
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel, __version__
from transformers.modeling_outputs import CausalLMOutputWithPast


class Own(PreTrainedModel, GenerationMixin):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        outputs = self.model(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache
        )
        return CausalLMOutputWithPast(logits=self.head(outputs[0]), past_key_values=outputs.past_key_values)


torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=32, initializer_range=1.0, eos_token_id=None, bos_token_id=None, **small)
model, ids = Own(config).eval(), torch.arange(6)[None]
rows = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached)[0, 6:] for cached in (True, False)]
same = torch.equal(*rows)
print(f"{__version__}: with a cache {rows[0].tolist()}, without {rows[1].tolist()}: {same}")
assert __version__ == sys.argv[1] and str(same) == sys.argv[2]
PY
for seen in "5.23.0 True" "5.24.0 False"; do
    venv/bin/pip install --quiet --no-compile transformers=="${seen% *}"
    venv/bin/python -W ignore show.py ${seen}
done
