#!/usr/bin/env bash
# transformers 5.23.0: attn_implementation as a dict names one kernel for each sub-configuration of a model. A name that
# no sub-configuration has (a misspelt "txt_config", or "text" for "text_config") is ignored without a word, and the
# part keeps its default, while an unknown kernel for a known part is refused.
# Seen: misspelt part: text eager -> sdpa (not asked for), vision sdpa / unknown kernel: ValueError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
from transformers import LlavaConfig, LlavaForConditionalGeneration


text = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
vision = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def kernels(**parts):
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=15)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=parts)
    return model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation


right = kernels(text_config="eager")
misspelt = kernels(txt_config="eager")
try:
    kernels(text_config="eagre")
    unknown = "taken"
except (ValueError, ImportError) as error:
    unknown = type(error).__name__
print("right name:", right, "misspelt name:", misspelt, "unknown kernel:", unknown)
assert right[0] == "eager" and misspelt[0] == "sdpa" and unknown == "ValueError"
PY
