#!/usr/bin/env bash
# transformers 5.23.0 against 4.35.2: additional special tokens that a folder of 2023 names in special_tokens_map.json,
# with their ids in added_tokens.json, are special by half: all_special_tokens lists them, as it did, but they were
# added as ordinary tokens (AddedToken.special is False), so that skip_special_tokens=True leaves them in the answers.
# Seen: 4.35.2: 'hi' / 5.23.0: 'hi<answer>'
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
mkdir folder
cat > write.py <<'PY'
import json

vocab = {"h": 0, "i": 1, "hi": 2, "<|endoftext|>": 3}
json.dump(vocab, open("folder/vocab.json", "w"))
open("folder/merges.txt", "w").write("#version: 0.2\nh i\n")
json.dump({"<answer>": 4}, open("folder/added_tokens.json", "w"))
names = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
json.dump({"tokenizer_class": "GPT2Tokenizer"}, open("folder/tokenizer_config.json", "w"))
json.dump(names | {"additional_special_tokens": ["<answer>"]}, open("folder/special_tokens_map.json", "w"))
PY
cat > show.py <<'PY'
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("folder")
assert tokenizer("hi<answer>")["input_ids"] == [2, 4]
text = tokenizer.decode([2, 4], skip_special_tokens=True)
special = tokenizer.added_tokens_decoder[4].special
print(f"{sys.argv[1]}: {text!r}, all_special_tokens: {tokenizer.all_special_tokens}, special: {special}")
assert "<answer>" in tokenizer.all_special_tokens
assert (text, special) == (sys.argv[2], sys.argv[2] == "hi")
PY
python3 write.py
python3 -m venv venv
for version in 4.35.2 5.23.0; do
    venv/bin/pip install --quiet --no-compile "transformers==$version"
    case $version in 4*) text='hi' ;; 5*) text='hi<answer>' ;; esac
    venv/bin/python show.py $version "$text"
done
