#!/usr/bin/env bash
# lmms-eval 0.7.3, MathVista: the number of decimals of an answer, which most rows do not have, is a float64 in the
# published data (AI4Math/MathVista). The score rounds to it; Python's round() takes whole numbers alone, the error is
# caught, and what was extracted becomes None: every question with a decimal answer counts as wrong.
# Seen: "1.5" against "1.5", precision 1.0: None, wrong / precision 1: 1.5, right
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m pip download --quiet --no-deps lmms-eval==0.7.3
# the class needs a key of a judge, these two functions nothing; no virtual environment: nothing is installed
python3 - <<'PY'
import ast
import glob
import zipfile

source = zipfile.ZipFile(glob.glob("*.whl")[0]).read("lmms_eval/tasks/mathvista/mathvista_evals.py").decode()
(cls,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
cls.body = [node for node in cls.body if getattr(node, "name", "") in ("normalize_extracted_answer", "safe_equal")]
exec(compile(ast.Module([cls], []), "mathvista_evals.py", "exec"))
evaluator = MathVistaEvaluator()
seen = {}
for precision in (1.0, 1):
    read = evaluator.normalize_extracted_answer("1.5", None, "free_form", "float", precision)
    seen[repr(precision)] = read, evaluator.safe_equal(read, "1.5")
print(f"precision -> what is read, right: {seen}")
assert seen == {"1.0": (None, False), "1": ("1.5", True)}
PY
