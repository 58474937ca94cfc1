#!/usr/bin/env bash
# transformers 5.23.0: FuyuProcessor has code that turns <box>y1, x1, y2, x2</box> in a prompt into the model's tokens
# for a box, in pixels of the picture as it was scaled. Its result is not used: tags and numbers go to the model as they
# are written. Answers are still read in the tokens (post_process_box_coordinates). Without torchvision the processor
# ends in a TypeError for every picture, as its image processor takes a tensor for an array: mended here first.
# Seen: tokens of a box: 0 of 2 / "<box>" as text: True / without torchvision: TypeError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 pillow==12.0.0
venv/bin/python -W ignore - <<'PY'
import string

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import FuyuImageProcessorPil, FuyuProcessor
from transformers.tokenization_utils_tokenizers import TokenizersBackend


class Pictures(FuyuImageProcessorPil):
    def patchify_image(self, image, patch_size=None):
        return torch.from_numpy(super().patchify_image(np.asarray(image), patch_size))


pieces = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|", *map(str, range(100))]
pieces += [f"<0x{byte:02X}>" for byte in range(256)]
letters = [(letter, -5.0) for letter in string.ascii_letters + string.punctuation + "▁"]
backend = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces] + letters, unk_id=0, byte_fallback=True))
backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
backend.decoder = decoders.Replace("▁", " ")
tokenizer = TokenizersBackend(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
sizes = {"size": {"height": 60, "width": 60}, "patch_size": {"height": 30, "width": 30}}
given = {"images": Image.new("RGB", (60, 60)), "text": "What is in <box>10, 20, 30, 40</box>?"}
try:
    as_it_is = FuyuProcessor(FuyuImageProcessorPil(**sizes), tokenizer)(**given)
except TypeError as error:
    as_it_is = type(error).__name__
ids = FuyuProcessor(Pictures(**sizes), tokenizer)(**given)["input_ids"][0].tolist()
tokens = tokenizer.convert_ids_to_tokens(ids)
found = [token for token in ("<0x00>", "<0x01>") if token in tokens]
written = "<box>" in "".join(tokens)
print(f'tokens of a box: {len(found)} of 2 / "<box>" as text: {written} / without torchvision: {as_it_is}')
assert tokens.count("|SPEAKER|") == 4 and tokens[-1] == "<0x04>"
assert not found and written and as_it_is == "TypeError"
PY
