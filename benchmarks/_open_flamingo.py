"""The few-shot loop of open_flamingo 2.0.1 for `fewshot.py`, in the environment of `tests/parity_2023/run.sh`.

The published package has the loops (`open_flamingo/eval/evaluate.py`) but not the classes they ask models through, so
that this follows `evaluate_vqa` and the model's `generate`: of each batch all pictures are preprocessed and encoded,
those of the examples too, once for each beam, and all text is read for each beam.
"""

import json
import sys

import torch


try:
    import torchvision  # noqa: F401
except RuntimeError:
    # its compiled operators want torch's build for CUDA; its transforms need only two names, as in tests/parity_2023
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
from fewshot import BATCH, BESIDE, WORDS, make_questions
from open_flamingo import Flamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.utils import extend_instance
from transformers import LlamaConfig, LlamaForCausalLM


IMAGE, END, VOCAB = 4, 3, 4096
TOKENS = ["<s>", "</s>", "<unk>", "<|endofchunk|>", "<image>", "Question:", "Answer:", "Output:"]
IDS = {token: i for i, token in enumerate([*TOKENS, *(f"w{number}" for number in range(WORDS))])}


def make_model() -> Flamingo:
    """The sizes of `decoding.py`; its resampler always has six layers."""
    torch.manual_seed(0)
    tower = {"image_size": 56, "layers": 2, "width": 256, "head_width": 64, "mlp_ratio": 2.0, "patch_size": 14}
    clip = open_clip.CLIP(embed_dim=64, vision_cfg=tower, text_cfg={"width": 64, "heads": 1, "layers": 1})
    clip.visual.output_tokens = True
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    lang_encoder = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB))
    extend_instance(lang_encoder, FlamingoLMMixin)
    lang_encoder.set_decoder_layers_attr_name("model.layers")
    return Flamingo(clip, lang_encoder, END, IMAGE, vis_dim=256, cross_attn_every_n_layers=2).eval()


def read(messages: list) -> tuple:
    """Token ids and pictures of a question."""
    text, pictures = "<s>", []
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                pictures.append(part["image"])
            text += " <image>" if part["type"] == "image" else part["text"]
        text += "<|endofchunk|>" if message["role"] == "assistant" else ""
    return [IDS[token] for token in text.split()], pictures


@torch.no_grad()
def ask(model: Flamingo, transform, questions: list, beams: int) -> list:
    answers = []
    for start in range(0, len(questions), BATCH):
        rows = [read(messages) for messages in questions[start : start + BATCH]]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[2] * (longest - len(own)) + own for own, _ in rows])
        mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own, _ in rows])
        pixels = torch.stack([torch.stack([transform(picture) for picture in own]) for _, own in rows])
        output = model.generate(
            pixels[:, :, None], ids, mask, num_beams=beams, max_new_tokens=5, min_new_tokens=0, length_penalty=0.0
        )
        answers += output[:, longest:].tolist()
    return answers


def main():
    model = make_model()
    transform = open_clip.transform.image_transform(56, is_train=False)
    questions = {kind: make_questions(kind) for kind, _ in BESIDE}
    questions["first"] = questions["few, fixed"][:2]
    for line in sys.stdin:
        kind, beams = line.strip().rsplit(", ", 1)
        print(json.dumps(ask(model, transform, questions[kind], int(beams))), flush=True)


if __name__ == "__main__":
    main()
