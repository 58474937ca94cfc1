#!/usr/bin/env bash
# transformers 5.23.0, Trainer with label_smoothing_factor: labels are shifted for the classes that are listed for
# AutoModelForCausalLM. Those of vision-language models, and one's own, are not among them: the logits of a token are
# compared with that same token, which the model has just read. Training goes well, and teaches to repeat the input.
# Seen: Llama: the loss is that of the next token / Llava, which holds a Llama: that of the token itself
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
venv/bin/python -W ignore - <<'PY'
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers import Trainer, TrainingArguments


small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
text, vision = LlamaConfig(vocab_size=32, **small), CLIPVisionConfig(image_size=4, patch_size=2, **small)
arguments = TrainingArguments("out", label_smoothing_factor=0.1, use_cpu=True, report_to=[])
ids = torch.arange(8)[None]
whole = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
torch.manual_seed(0)
seen = []
for model in (LlamaForCausalLM(text), LlavaForConditionalGeneration(whole)):
    trainer = Trainer(model.eval(), arguments)
    with torch.no_grad():
        loss, logits = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}), model(input_ids=ids).logits
    entropy = torch.nn.functional.cross_entropy
    of_next = entropy(logits[0, :-1], ids[0, 1:], label_smoothing=0.1)
    of_itself = entropy(logits[0], ids[0], label_smoothing=0.1)
    (which,) = [name for name, value in (("next", of_next), ("itself", of_itself)) if torch.isclose(loss, value)]
    seen.append(which)
    print(f"{type(model).__name__}: {loss:.4f}; of the next token {of_next:.4f}, of the token itself {of_itself:.4f}")
assert seen == ["next", "itself"]
PY
