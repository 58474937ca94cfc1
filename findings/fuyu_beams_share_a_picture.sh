#!/usr/bin/env bash
# transformers 5.23.0: generate() with beams or num_return_sequences repeats its inputs along their first axis. That of
# Fuyu's image_patches counts patches, not rows: their number fits, nothing is told, and the first of two beams is given
# each patch of the upper half twice, the second those of the lower half. Under the new name, pixel_values
# (return_legacy_image_output=False), patches are not repeated at all, and a ValueError says that they are too few.
# Seen: patches of the beams: [0, 0, 1, 1] and [2, 2, 3, 3], of one picture [0, 1, 2, 3] / pixel_values: ValueError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python -W ignore - <<'PY'
import torch
from transformers import FuyuConfig, FuyuForCausalLM


text = {"model_type": "persimmon", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
model = FuyuForCausalLM(FuyuConfig(text_config=text, patch_size=2, image_token_id=31)).eval()
ids, patches = torch.tensor([[31, 31, 31, 31, 1, 5]]), torch.randn(4, 12)
seen = []
model.model.language_model.register_forward_pre_hook(
    lambda module, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True
)


def patches_of_rows(name, beams):
    seen.clear()
    try:
        model.generate(input_ids=ids, **{name: patches}, num_beams=beams, max_new_tokens=2)
    except ValueError as error:
        return type(error).__name__
    known = model.model.vision_embed_tokens(patches)
    return [torch.cdist(row[:4], known).argmin(dim=1).tolist() for row in seen[0]]


one, two = patches_of_rows("image_patches", 1), patches_of_rows("image_patches", 2)
renamed = patches_of_rows("pixel_values", 1), patches_of_rows("pixel_values", 2)
print(f"image_patches: {one} of one row, {two} of two beams / pixel_values: {renamed}")
assert one == [[0, 1, 2, 3]] and two == [[0, 0, 1, 1], [2, 2, 3, 3]]
assert renamed == (one, "ValueError")
PY
