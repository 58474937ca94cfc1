#!/usr/bin/env bash
# lmms-eval 0.7.3: its copy of the table with which GPT-4 grades MM-Vet is not the official one (yuweihao/MM-Vet): the
# heading of the first column has become the name of a variable, and the empty line above is gone, as after a search
# and replace. Grades are thus asked for with another prompt than those of the paper and its leaderboard.
# Seen: sha256 of the copy 4d9b806e960f; with both put back: d1b3e0a5b4e7..., that of the official table
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m pip download --quiet --no-deps lmms-eval==0.7.3
# no virtual environment: nothing is installed
python3 - <<'PY'
import ast
import glob
import hashlib
import zipfile

source = zipfile.ZipFile(glob.glob("*.whl")[0]).read("lmms_eval/tasks/mmvet/utils.py").decode()
constants = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
(table,) = [ast.literal_eval(node.value) for node in constants if node.targets[0].id == "MM_VET_PROMPT"]
official = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
mended = table.replace("\ngpt_query_prompt |", "\n\nQuestion |")
digests = [hashlib.sha256(text.encode()).hexdigest() for text in (table, mended)]
print(f"sha256 of the copy {digests[0][:12]}; with both put back: {digests[1][:12]}")
assert digests[0].startswith("4d9b806e960f")
assert table.count("gpt_query_prompt") == 1
assert digests[1] == official
PY
