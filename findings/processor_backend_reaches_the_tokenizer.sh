#!/usr/bin/env bash
# transformers 5.23.0: `backend="pil"` of a processor's `from_pretrained` is meant for the image processor, but is handed to
# the tokenizer, too, which keeps it as its own backend: a fast tokenizer then refuses masks of assistant tokens as a slow
# one, and the word is saved with it.
# Seen: is_fast True, backend pil; ValueError: `return_assistant_tokens_mask` is not possible with slow tokenizers
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 pillow jinja2
venv/bin/python - <<'PY'
import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessorPil, CLIPProcessor, PreTrainedTokenizerFast


words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained("processor")

chat, options = [{"role": "assistant", "content": "hello"}], {"return_dict": True, "return_assistant_tokens_mask": True}
seen = {}
for backend in (None, "pil"):
    processor = AutoProcessor.from_pretrained("processor", **({"backend": backend} if backend else {}))
    loaded = processor.tokenizer
    processor.chat_template = loaded.chat_template
    try:
        mask = processor.apply_chat_template([chat], tokenize=True, **options)
        seen[loaded.backend] = loaded.is_fast, sorted(mask)
    except ValueError as error:
        seen[loaded.backend] = loaded.is_fast, str(error)[:70]
loaded.save_pretrained("saved")
saved = json.load(open("saved/tokenizer_config.json"))["backend"]
print(seen, saved)
assert "assistant_masks" in seen["tokenizers"][1] and seen["pil"][0] and "slow tokenizers" in seen["pil"][1]
assert saved == "pil"
PY
