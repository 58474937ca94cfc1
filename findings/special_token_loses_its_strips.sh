#!/usr/bin/env bash
# tokenizers 0.23.3: add_special_tokens with the text of a token that is there already leaves the vocabulary as it is,
# but replaces the token's settings, and counts it as added: one that took the blanks beside it (lstrip, rstrip), as
# those of chat formats do, no longer does, and prompts have other ids. Making sure that a token exists is thus no
# harmless call; the AddedToken itself has to be handed back.
# Seen: [3, 4, 3] / add_special_tokens(["<image>"]) returns 1, 5 tokens as before / [3, 2, 4, 2, 3]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --no-deps tokenizers==0.23.3
venv/bin/python - <<'PY'
from tokenizers import AddedToken, Tokenizer, models, normalizers

tokenizer = Tokenizer(models.BPE(vocab={"h": 0, "i": 1, "▁": 2, "hi": 3}, merges=[("h", "i")]))
tokenizer.normalizer = normalizers.Replace(" ", "▁")
image = AddedToken("<image>", lstrip=True, rstrip=True, normalized=False, special=True)
tokenizer.add_special_tokens([image])
rows, sizes = [tokenizer.encode("hi <image> hi").ids], [tokenizer.get_vocab_size()]
for token in ("<image>", image):
    added = tokenizer.add_special_tokens([token])
    rows.append(tokenizer.encode("hi <image> hi").ids)
    sizes.append(tokenizer.get_vocab_size())
    print(f"{rows[-2]} / add_special_tokens([{token!r}]) returns {added}, {sizes[-1]} tokens / {rows[-1]}")
    assert added == 1
assert sizes == [5, 5, 5]
assert rows == [[3, 4, 3], [3, 2, 4, 2, 3], [3, 4, 3]]
PY
