#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: an adapter of a model whose vocabulary was extended is saved with the
# embeddings, without being asked. Whether it was is told by config.vocab_size, which vision-language models do not have
# (it is in their text_config): the rows of the new tokens are not saved, and nothing is said.
# Seen: embeddings in the adapter: Llama 2, Llava 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 peft==0.21.2
venv/bin/python -W ignore - <<'PY'
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration


small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
text, vision = LlamaConfig(vocab_size=32, **small), CLIPVisionConfig(image_size=4, patch_size=2, **small)
whole = LlavaConfig(vision_config=vision, text_config=text)
seen = {}
for model_class, config in ((LlamaForCausalLM, text), (LlavaForConditionalGeneration, whole)):
    name = model_class.__name__
    model_class(config).save_pretrained(name)
    model = model_class.from_pretrained(name)
    model.resize_token_embeddings(40)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(f"{name}-adapter")
    with safe_open(f"{name}-adapter/adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    seen[name] = sum(shape == [40, 16] for shape in shapes.values())
print(f"embeddings in the adapter: {seen}")
assert seen == {"LlamaForCausalLM": 2, "LlavaForConditionalGeneration": 0}
PY
