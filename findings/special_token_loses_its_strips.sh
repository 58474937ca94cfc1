#!/usr/bin/env bash
# tokenizers 0.23.3: add_special_tokens with the text of a token that is there already adds nothing and returns 0, but
# replaces the token's settings: one that took the blanks beside it (lstrip, rstrip), as those of chat formats do, no
# longer does, and prompts have other ids. Making sure that a token exists is thus no harmless call; the AddedToken
# itself has to be handed back.
# Seen: ['hi', '<image>', 'hi'] / add_special_tokens(["<image>"]) returns 0 / ['hi', '▁', '<image>', '▁', 'hi']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile tokenizers==0.23.3
venv/bin/python - <<'PY'
from tokenizers import AddedToken, Tokenizer, models, normalizers

tokenizer = Tokenizer(models.BPE(vocab={"h": 0, "i": 1, "▁": 2, "hi": 3}, merges=[("h", "i")]))
tokenizer.normalizer = normalizers.Replace(" ", "▁")
image = AddedToken("<image>", lstrip=True, rstrip=True, normalized=False, special=True)
tokenizer.add_special_tokens([image])
rows = [tokenizer.encode("hi <image> hi").tokens]
added = tokenizer.add_special_tokens(["<image>"])
rows.append(tokenizer.encode("hi <image> hi").tokens)
tokenizer.add_special_tokens([image])
rows.append(tokenizer.encode("hi <image> hi").tokens)
print(rows[0], f'/ add_special_tokens(["<image>"]) returns {added} /', rows[1])
assert added == 0
assert rows[0] == rows[2] == ["hi", "<image>", "hi"], rows
assert rows[1] == ["hi", "▁", "<image>", "▁", "hi"], rows
PY
