#!/bin/sh
# Run transformers' common test mixins on our models. Usage: tests/conformance/run.sh [pytest arguments]
#
# The mixins come from transformers' source distribution on PyPI, unpacked into a cache and never committed. It lacks
# GenerationTesterMixin and ExportTesterMixin; with TRANSFORMERS_TESTS=/path/to/transformers/tests (a git checkout of
# the same version) those run too.
#
# PYTHON: interpreter to use (default: python). CONFORMANCE_CACHE: folder (default: ~/.cache/otter-hf-conformance).
set -eu

version=5.23.0
python=${PYTHON:-python}
here=$(cd "$(dirname "$0")" && pwd)
cache=${CONFORMANCE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/otter-hf-conformance}
tree=$cache/transformers-$version

mkdir -p "$cache"
if [ ! -d "$tree" ]; then
    "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$cache" "transformers==$version"
    tar -xzf "$tree.tar.gz" -C "$cache"
fi
if [ ! -d "$cache/site/parameterized" ]; then
    "$python" -m pip install --quiet --no-deps --target "$cache/site" parameterized
fi

tests=$tree/tests
mkdir -p "$tests/generation" "$tests/exporters" "$tests/otter_hf" "$tree/utils"
touch "$tests/__init__.py" "$tests/generation/__init__.py" "$tests/exporters/__init__.py" "$tests/otter_hf/__init__.py"
# what the mixins import and the source distribution leaves out
printf 'def url_to_local_path(url):\n    return url\n' > "$tree/utils/fetch_hub_objects_for_ci.py"
if [ -n "${TRANSFORMERS_TESTS:-}" ]; then
    cp "$TRANSFORMERS_TESTS/generation/test_utils.py" "$tests/generation/test_utils.py"
    cp "$TRANSFORMERS_TESTS/exporters/"*.py "$tests/exporters/"
else
    printf 'class GenerationTesterMixin:\n    pass\n' > "$tests/generation/test_utils.py"
    printf 'class ExportTesterMixin:\n    pass\n' > "$tests/exporters/test_export.py"
fi
cp "$here"/conformance_*.py "$here"/../models/tiny_flamingo.py "$tests/otter_hf/"

cd "$tree"
export PYTHONPATH="$cache/site:$tree/utils:$tests/otter_hf${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 RUN_TRAINING_TESTS=1
exec "$python" -m pytest -p no:cacheprovider -rs tests/otter_hf/conformance_*.py "$@"
