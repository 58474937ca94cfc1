#!/usr/bin/env bash
# transformers 5.23.0: `transformers serve` takes OpenAI's frequency_penalty and computes something else: it becomes
# repetition_penalty = 1 + frequency_penalty, which divides logits, counts the words of the prompt as well, and does
# not grow with how often a word was said.
# Seen: frequency_penalty 0.5 -> repetition_penalty 1.5 / -0.5 -> 0.5
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 \
    fastapi==0.165.0 openai==3.54.0 pydantic==2.14.4 uvicorn==0.54.0
venv/bin/python - <<'PY'
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState

handler = ChatCompletionHandler(None, GenerationState())
for penalty in (0.5, -0.5):
    body = {"messages": [], "frequency_penalty": penalty, "max_completion_tokens": 8}
    config = handler._build_generation_config(body, GenerationConfig())
    print(f"frequency_penalty {penalty} -> repetition_penalty {config.repetition_penalty}")
    assert config.repetition_penalty == 1 + penalty
PY
