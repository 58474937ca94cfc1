#!/usr/bin/env bash
# pycocoevalcap 1.2, the official caption scores (CIDEr, BLEU, METEOR): PTBTokenizer hands all captions to a Java
# program as lines and takes its lines back in order. It replaces line feeds in a caption beforehand, but not
# carriage returns, at which the Java side breaks lines too: every later picture then gets its predecessor's words,
# and the last one's are lost, without an error. It also drops "-LRB-" and "-RRB-" from the result, which the tool
# writes in lower case: brackets stay as words. Needs Java.
# Seen: {1: ['a red'], 2: ['bus'], 3: ['a cat -lrb- black -rrb-']} instead of {1: ['a red bus'], 2: ['a cat black'],
# 3: ...}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
command -v java > /dev/null || { echo "no java here"; exit 1; }
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --no-deps pycocoevalcap==1.2
venv/bin/python - <<'PY'
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

captions = {1: "a red\rbus", 2: "a cat (black)", 3: "a dog"}
tokens = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in captions.items()})
print(tokens)
assert tokens == {1: ["a red"], 2: ["bus"], 3: ["a cat -lrb- black -rrb-"]}
captions[1] = "a red\nbus"
tokens = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in captions.items()})
assert tokens == {1: ["a red bus"], 2: ["a cat -lrb- black -rrb-"], 3: ["a dog"]}, tokens
PY
