#!/usr/bin/env bash
# transformers 5.23.0: IDEFICS keeps <image> and its like in rows of their own (additional_vocab_size, 2 in the released
# models), and its logits have these columns too. Its loss is told vocab_size without them and cuts the logits up by
# that width: a forward pass with labels ends in an error of shapes. With additional_vocab_size=0 it has a loss.
# Seen: shape of the logits: (1, 8, 34) / loss: RuntimeError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 pillow==12.0.0
venv/bin/python - <<'PY'
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text


def loss_of(additional):
    config = IdeficsConfig(
        vocab_size=32, additional_vocab_size=additional, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, cross_layer_interval=1, use_resampler=False,
        vision_config={"embed_dim": 16, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "intermediate_size": 16},
    )
    model = IdeficsForVisionText2Text(config)
    ids = torch.arange(8)[None]
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 1, 3, 8, 8)}
    inputs |= {"attention_mask": torch.ones_like(ids), "image_attention_mask": torch.ones(1, 8, 1, dtype=torch.long)}
    shape = tuple(model(**inputs).logits.shape)
    try:
        return shape, model(**inputs, labels=ids).loss.item()
    except RuntimeError as error:
        return shape, type(error).__name__


assert isinstance(loss_of(0)[1], float)
shape, loss = loss_of(2)
print(f"shape of the logits: {shape} / loss: {loss}")
assert shape == (1, 8, 34) and loss == "RuntimeError"
PY
