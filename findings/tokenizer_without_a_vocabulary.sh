#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer of a folder that names its tokenizer but lacks the vocabulary (a download that was
# cut off, tokenizer.json left out of a copy) is no error and gives no warning where that is LLaMA's: it makes one of
# three tokens, for which every text is empty. Without tokenizer_config.json it is an error.
# Seen: config.json alone: ValueError / with tokenizer_config.json: 3 tokens, the ids of a sentence: []
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python -W ignore - <<'PY'
import json
import pathlib

from transformers import AutoTokenizer


folder = pathlib.Path("model")
folder.mkdir()
files = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}
seen = []
for name, content in files.items():
    (folder / name).write_text(json.dumps(content))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        seen.append((len(tokenizer), tokenizer("What is in this picture?")["input_ids"]))
    except ValueError as error:
        seen.append(type(error).__name__)
print(f"config.json alone: {seen[0]} / with tokenizer_config.json: tokens, ids of a sentence: {seen[1]}")
assert seen == ["ValueError", (3, [])]
PY
