#!/usr/bin/env bash
# transformers 5.23.0: the processor of IDEFICS puts <end_of_utterance> between two texts if the tokenizer has it, as
# that of the instructed models has. It looks among the named special tokens, where transformers 5 no longer lists those
# of a tokenizer's own: the models that were trained with it are asked without, unless it is demanded.
# Seen: among the special tokens: True / in the prompt: 0 times, demanded 2 times
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 pillow==12.0.0
venv/bin/python -W ignore - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import IdeficsImageProcessorPil, IdeficsProcessor, PreTrainedTokenizerFast


own = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
words = ["<unk>", "<s>", "</s>", "<pad>", "User:", "Assistant:", "yes", "why", "hello"]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, additional_special_tokens=own)
processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=8), tokenizer)
turns = [["User: hello ", "Assistant: yes ", "User: why "]]
end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")


def count(**given):
    return processor(text=turns, **given)["input_ids"][0].tolist().count(end)


listed = "<end_of_utterance>" in tokenizer.all_special_tokens
by_itself, demanded = count(), count(add_end_of_utterance_token=True)
print(f"among the special tokens: {listed} / in the prompt: {by_itself} times, demanded {demanded} times")
assert listed and (by_itself, demanded) == (0, 2)
PY
