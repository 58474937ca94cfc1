#!/usr/bin/env bash
# transformers 5.23.0: the names that a model's conversion mapping reads are patterns, and save_pretrained writes the
# original names by turning them round. Of a pattern only ^, $, lookarounds and escaped dots are taken out: \b, with which
# one keeps "model." from matching inside "language_model.", is written into the file's names as it stands.
# Seen: transformer.blocks.0.norm -> decoder.blocks.0.norm -> \btransformer.blocks.0.norm
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0
venv/bin/python - <<'PY'
from transformers.core_model_loading import WeightRenaming


renaming = WeightRenaming(r"\btransformer\.blocks", "decoder.blocks")
name = "transformer.blocks.0.norm"
read = renaming.rename_source_key(name)[0]
written = renaming.reverse_transform().rename_source_key(read)[0]
print(f"{name} -> {read} -> {written}")
assert read == "decoder.blocks.0.norm" and written == "\\b" + name
PY
