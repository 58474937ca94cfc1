"""Time to the first token of a question behind eight worked examples: with a skill, and reading them again.

    OMP_NUM_THREADS=2 python benchmarks/skills.py      # about two minutes on two cores

Random weights, float32: the model of `decoding.py` (decoder of width 512 and 8 layers, a small tower at 56 pixels) as
an Otter; the same decoder behind CLIP ViT-B/32 at 224 pixels and a resampler of 6 layers with 64 latents; and an
OtterHD of the same decoder widths, whose pictures of 300 x 300 pixels are 100 tokens each. Eight examples with a
picture each (for the Otters of 640 x 480 pixels) stand in front of a question with a ninth; one token is generated.
The examples' answers are of one token, or sentences of 80 bytes (a token is a byte).
First the processor has done its work, with the pixels of all nine pictures on both sides; then it is part of the time:
from messages to the token, the examples' pictures being prepared with a skill. The peer is the same model given the
whole prompt; the tokens are compared.
"""

import argparse
import string

import torch
from _common import compare, report
from decoding import HEADS, LAYERS, VISION, VOCAB, WIDTH
from PIL import Image
from tokenizers import Tokenizer, models, normalizers
from transformers import CLIPImageProcessorPil
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from otter_hf import (
    OtterConfig,
    OtterForConditionalGeneration,
    OtterHDConfig,
    OtterHDForConditionalGeneration,
    OtterHDImageProcessor,
    OtterHDProcessor,
    OtterProcessor,
)
from otter_hf.models.skills import Skill
from otter_hf.testing.otter import byte_tokenizer


SHOTS = 8
VIT_B = {"patch_size": 32, "hidden_size": 768, "intermediate_size": 3072}
VIT_B |= {"num_hidden_layers": 12, "num_attention_heads": 12}


def make_otter(image_size: int, vision: dict, resampler: dict):
    """The model, and a processor with a token per byte."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    side = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(size=side, do_center_crop=False)
    processor = OtterProcessor(images, OtterProcessor.prepare_tokenizer(tokenizer))
    vision = {"model_type": "clip_vision_model", "image_size": image_size, **vision}
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = OtterConfig(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=1.0,
        perceiver_num_latents=64,
        image_token_id=processor.image_token_id,
        **resampler,
    )
    torch.manual_seed(0)
    return OtterForConditionalGeneration(config).eval(), processor


def make_otterhd():
    pieces = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|ENDOFTEXT|", "|NEWLINE|"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(piece, 0.0) for piece in pieces]
    vocabulary += [(letter, -5.0) for letter in string.ascii_letters + string.punctuation + "▁"]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    end = "|ENDOFTEXT|"
    tokenizer = TokenizersBackend(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token="<unk>")
    processor = OtterHDProcessor(OtterHDImageProcessor(), tokenizer)
    text = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": HEADS, "max_position_embeddings": 4096, "rope_theta": 25000.0}
    torch.manual_seed(0)
    config = OtterHDConfig(image_token_id=processor.image_token_id, text_config=text)
    return OtterHDForConditionalGeneration(config).eval(), processor


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def message(role: str, text: str, image: Image.Image | None = None) -> dict:
    media = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*media, {"type": "text", "text": text}]}


def read(processor, messages: list[dict]):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def measure(name: str, model, processor, size: tuple[int, int], answer_length: int, repeats: int) -> list[dict]:
    """Rows of one model, whose examples have answers of `answer_length` tokens."""
    name += ", short answers" if answer_length == 1 else ", sentences"
    pictures = [picture(number, size) for number in range(SHOTS + 1)]
    examples = []
    for number in range(SHOTS):
        said = string.ascii_letters[number] * answer_length
        examples += [message("user", "what?", pictures[number]), message("assistant", said)]
    question = [message("user", "what?", pictures[SHOTS])]
    skill = Skill.compile(model, processor, examples)
    inputs = read(processor, examples + question)

    def answer(inputs, skill: Skill | None) -> int:
        cache = None if skill is None else skill.cache_for(inputs)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        return int(output[0, -1])

    if answer(inputs, skill) != answer(inputs, None):
        raise SystemExit("With and without the skill the model generates different tokens.")
    tokens = {"tokens": inputs["input_ids"].shape[1], "of_skill": skill.input_ids.shape[1]}
    return [
        compare(
            f"{name}: first token behind {SHOTS} pictures",
            lambda: answer(inputs, skill),
            lambda: answer(inputs, None),
            repeats,
            **tokens,
        ),
        compare(
            f"{name}: the same from messages, processor included",
            lambda: answer(read(processor, skill.messages + question), skill),
            lambda: answer(read(processor, examples + question), None),
            repeats,
            **tokens,
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with torch.inference_mode():
        models = {
            "Otter": (*make_otter(56, {"patch_size": 14, **VISION}, {"perceiver_depth": 2}), (640, 480)),
            "Otter, CLIP ViT-B/32": (*make_otter(224, VIT_B, {}), (640, 480)),
            "OtterHD": (*make_otterhd(), (300, 300)),
        }
        rows = []
        for name, parts in models.items():
            for answer_length in (1, 80):
                rows += measure(name, *parts, answer_length, args.repeats)
    report("skills", "the same model given the whole prompt", rows)


if __name__ == "__main__":
    main()
