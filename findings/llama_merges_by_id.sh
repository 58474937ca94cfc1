#!/usr/bin/env bash
# transformers 5.23.0: a LlamaTokenizer made from a SentencePiece file alone gives other ids than SentencePiece does
# with that file. The merges are ordered by the ids of the pieces, where SentencePiece merges by their scores; the
# two orders agree for most pieces, but not for runs of blanks, so plain English passes and indented code or a double
# blank does not.
# Seen: 'two dogs' the same / 'two  dogs': ['▁two', '▁▁', 'dog', 's'], SentencePiece ['▁two', '▁', '▁dogs']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --no-deps mistral-common==1.13.1 # has a real vocabulary of this kind
venv/bin/pip install --quiet --no-compile transformers==5.23.0 sentencepiece==0.2.1 protobuf
mkdir folder
cp venv/lib/python3*/site-packages/mistral_common/data/tokenizer.model.v1 folder/tokenizer.model
echo '{"tokenizer_class": "LlamaTokenizer", "legacy": true, "add_bos_token": false}' > folder/tokenizer_config.json
venv/bin/python - <<'PY'
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

ours, reference = AutoTokenizer.from_pretrained("folder"), SentencePieceProcessor("folder/tokenizer.model")
differ = []
for text in ("two dogs", "two  dogs", "def f():\n    return 1"):
    pieces, expected = ours.convert_ids_to_tokens(ours(text)["input_ids"]), reference.encode(text, out_type=str)
    print(repr(text), "the same" if pieces == expected else f"{pieces}, SentencePiece {expected}")
    differ.append(pieces != expected)
assert differ == [False, True, True]
PY
