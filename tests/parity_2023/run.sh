#!/bin/sh
# Run the code of 2023 and ours on the same folders, prompts and pictures. Usage: tests/parity_2023/run.sh [CASE ...]
#
# PYTHON: interpreter with otter-hf (default: python). PYTHON_2023: a Python 3.11 for the old code's environment
# (default: python3.11). PARITY_CACHE: where that environment is kept (default: ~/.cache/otter-hf-parity-2023).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${PARITY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/otter-hf-parity-2023}
old=$cache/venv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! cat "$here"/requirements*.txt | cmp -s - "$old/installed.txt"; then
    rm -rf "$old"
    "${PYTHON_2023:-python3.11}" -m venv "$old"
    # torch first: asked for by its exact version alone, pip takes the CPU build where one is at hand
    "$old/bin/python" -m pip install --quiet "$(grep '^torch==' "$here/requirements.txt")"
    "$old/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
    "$old/bin/python" -m pip install --quiet --no-deps --requirement "$here/requirements_no_deps.txt"
    cat "$here"/requirements*.txt > "$old/installed.txt"
fi
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
# the old code asks for its tokenizers by their names on the Hub, which are folders below the current one here
(cd "$work" && "$old/bin/python" "$here/write_2023.py" "$@")
"${PYTHON:-python}" "$here/compare.py" "$work"
