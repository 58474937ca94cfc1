#!/usr/bin/env bash
# transformers 5.23.0 against 4.35.2: a LLaMA tokenizer folder of early 2023, whose tokenizer_config.json names the
# class and three tokens, loses its BOS token and the blank in front of a text behind an added token. A missing
# add_bos_token meant True, it means False; a missing `legacy` meant the old spacing, it means the new one.
# use_fast=False, which chose the SentencePiece implementation, chooses nothing. No warning is given, and models
# answer from another prompt.
# Seen: 4.35.2: ['<s>', '<image>', '▁User', ...] / 5.23.0: ['<image>', 'User', ...], with use_fast=False too
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --no-deps mistral-common==1.13.1 # has a real vocabulary of this kind
mkdir folder
cp venv/lib/python3*/site-packages/mistral_common/data/tokenizer.model.v1 folder/tokenizer.model
echo '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}' \
    > folder/tokenizer_config.json
cat > show.py <<'PY'
import json
import sys

from transformers import AutoTokenizer

rows = []
for use_fast in (True, False):
    tokenizer = AutoTokenizer.from_pretrained("folder", use_fast=use_fast)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    rows.append(tokenizer.convert_ids_to_tokens(tokenizer("<image>User: hi")["input_ids"]))
    print(sys.argv[1], f"use_fast={use_fast}:", type(tokenizer).__mro__[1].__name__, rows[-1])
assert all(row == json.loads(sys.argv[2]) for row in rows), rows
PY
for version in 4.35.2 5.23.0; do
    venv/bin/pip install --quiet --no-compile "transformers==$version" sentencepiece==0.2.1 protobuf==3.20.3
    case $version in
        4*) expected='["<s>", "<image>", "▁User", ":", "▁hi"]' ;;
        5*) expected='["<image>", "User", ":", "▁hi"]' ;;
    esac
    venv/bin/python show.py $version "$expected"
done
