#!/usr/bin/env bash
# TRL 1.16.0 with transformers 5.23.0: SFTTrainer's collator for pictures labels all tokens but padding, among them the
# placeholders of the picture, which models are to leave out of their loss; LLaVA does not. Most of what is learned is
# to write <image>, hundreds of times for a picture, and a loss near nothing says little of the answers.
# Seen: labels: 49 of <image>, 4 of words / the model's loss is the mean over all 52 that have a token in front
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile trl==1.16.0 transformers==5.23.0 pillow==12.0.0
venv/bin/python -W ignore - <<'PY'
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


words = ["<unk>", "<pad>", "what", "a", "dog", "."]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
)
size = {"height": 28, "width": 28}
pictures = CLIPImageProcessorPil(size=size, crop_size=size)
template = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
)
processor = LlavaProcessor(
    pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
    num_additional_image_tokens=1,
)
messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a dog ."}]
row = {"images": [Image.new("RGB", (28, 28))], "messages": messages}
batch = DataCollatorForVisionLanguageModeling(processor)([row])
small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlavaConfig(
    vision_config=CLIPVisionConfig(image_size=28, patch_size=4, **small),
    text_config=LlamaConfig(vocab_size=8, **small),
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    vision_feature_layer=-1,
)
model = LlavaForConditionalGeneration(config).eval()
with torch.no_grad():
    outputs = model(**batch)
labels = batch["labels"][0]
learned = labels[labels != -100]
images = int((learned == processor.image_token_id).sum())
over_all = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[1:])
same = torch.isclose(over_all, outputs.loss).item()
print(f"labels: {images} of <image>, {len(learned) - images} of words / loss is the mean over all: {same}")
assert (images, len(learned)) == (49, 53) and same
PY
