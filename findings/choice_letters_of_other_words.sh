#!/usr/bin/env bash
# lmms-eval 0.7.3, extract_mcq_answer, with which MMBench (static), MMStar, VideoMME and others find the letter of an
# answer in prose: behind "the answer is" each letter is looked for as a character, and the LAST that is found wins, be
# it the capital of a later word; an article that opens the reply goes before all.
# Seen: "The answer is B. Cats have whiskers." -> C / "A dog is shown, so the answer is B." -> A
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m pip download --quiet --no-deps lmms-eval==0.7.3
# no virtual environment: nothing is installed
python3 - <<'PY'
import glob
import zipfile

path = "lmms_eval/tasks/_task_utils/mcq_extract.py"
exec(compile(zipfile.ZipFile(glob.glob("*.whl")[0]).read(path), path, "exec"))
expected = {
    "B": "B",
    "The answer is B.": "B",
    "The answer is B. Cats have whiskers.": "C",
    "The correct answer is (B), as in Denmark.": "D",
    "A dog is shown, so the answer is B.": "A",
}
seen = {reply: extract_mcq_answer(reply, choices=list("ABCD")) for reply in expected}
for reply, letter in seen.items():
    print(f"{reply} -> {letter}")
assert seen == expected
PY
