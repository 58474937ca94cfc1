#!/usr/bin/env bash
# tokenizers 0.23.3: a tokenizer.json that it has written is unreadable for the releases of transformers 4.28 and 4.35
# (0.13.3, 0.15.2), although the format still calls itself "1.0" and the model is the same: merges are written as pairs
# where they were texts with a blank between. The other way round works. With the pairs as texts the old ones read it.
# Needs Python 3.11 or older.
# Seen: 0.13.3 and 0.15.2: pairs: Exception, texts: ['ab', 'c'] / 0.23.3: ['ab', 'c'] from both
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
for version in 0.23.3 0.15.2 0.13.3; do
    python3 -m venv $version
    $version/bin/pip install --quiet --no-compile --no-deps tokenizers==$version
done
0.23.3/bin/python - <<'PY'
import json

from tokenizers import Tokenizer, models

Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3}, merges=[("a", "b")])).save("pairs.json")
written = json.load(open("pairs.json"))
assert (written["version"], written["model"]["merges"]) == ("1.0", [["a", "b"]]), written
written["model"]["merges"] = ["a b"]
json.dump(written, open("texts.json", "w"))
PY
cat > show.py <<'PY'
import sys

from tokenizers import Tokenizer

seen = []
for name in ("pairs", "texts"):
    try:
        seen.append(str(Tokenizer.from_file(f"{name}.json").encode("abc").tokens))
    except Exception as error:
        seen.append(type(error).__name__)
print(f"{sys.argv[1]}: pairs: {seen[0]}, texts: {seen[1]}")
assert seen == ["['ab', 'c']" if sys.argv[1] == "0.23.3" else "Exception", "['ab', 'c']"]
PY
for version in 0.23.3 0.15.2 0.13.3; do
    $version/bin/python show.py $version
done
