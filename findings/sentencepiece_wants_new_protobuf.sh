#!/usr/bin/env bash
# sentencepiece 0.2.3: its reader of model files, sentencepiece_model_pb2, which converters import, is bound to the
# newest protobuf: with 6.33.6 the import fails, though no requirement of the package says so (its extra `protobuf`
# takes any version) and pip check finds nothing wrong. The processor itself works.
# Seen: protobuf 6.33.6: VersionError, pip check: No broken requirements found. / protobuf 7.36.2: imported
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile 'sentencepiece[protobuf]==0.2.3' protobuf==6.33.6
cat > show.py <<'PY'
import sys

import sentencepiece

sentencepiece.SentencePieceProcessor()
try:
    from sentencepiece import sentencepiece_model_pb2

    sentencepiece_model_pb2.ModelProto()
    seen = "imported"
except Exception as error:
    seen = type(error).__name__
print(f"protobuf {sys.argv[1]}: {seen}")
assert seen == sys.argv[2]
PY
venv/bin/pip check
venv/bin/python show.py 6.33.6 VersionError
venv/bin/pip install --quiet --no-compile protobuf==7.36.2
venv/bin/python show.py 7.36.2 imported
