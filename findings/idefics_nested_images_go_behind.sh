#!/usr/bin/env bash
# transformers 5.23.0: the processor of IDEFICS, asked with images= and text=, puts the picture in front of the text if
# images is a flat list, one for each text, and behind it if the list is nested, as its own message advises for several:
# the model then reads "Assistant:" before it has seen anything.
# Seen: images=[picture]: the picture comes first / images=[[picture]]: last
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 pillow==12.0.0
venv/bin/python -W ignore - <<'PY'
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import IdeficsImageProcessorPil, IdeficsProcessor, PreTrainedTokenizerFast


own = ["<fake_token_around_image>", "<image>"]
words = ["<unk>", "<s>", "</s>", "<pad>", "User:", "what", "Assistant:"]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, additional_special_tokens=own)
processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=8), tokenizer)
picture, prompt = Image.new("RGB", (8, 8)), "User: what Assistant:"


def tokens(images):
    ids = processor(images=images, text=[prompt])["input_ids"][0].tolist()
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token not in ("<s>", own[0])]


flat, nested = tokens([picture]), tokens([[picture]])
print(f"images=[picture]: {flat} / images=[[picture]]: {nested}")
assert flat == ["<image>", "User:", "what", "Assistant:"]
assert nested == ["User:", "what", "Assistant:", "<image>"]
PY
