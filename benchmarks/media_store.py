"""Few-shot questions whose demonstrations come again: each picture encoded once, beside each time.

    OMP_NUM_THREADS=2 python benchmarks/media_store.py      # about five minutes on two cores

Random weights, float32: CLIP ViT-B/32 at 224 pixels, a resampler of 6 layers with 64 latents, and the decoder of
`decoding.py` (width 512, 8 layers). A question is a row of 9 pictures with 16 tokens each: the last is new, the others
are demonstrations; 5 tokens are generated greedily, as in OpenFlamingo's VQA. Demonstrations are the same
for all questions, or drawn for each from 100 pictures. Pixels are given, so that the processor is not timed. The peer
gives `pixel_values` to the same model. A repeat is 20 questions, with a store that is empty at first; the tokens of
both sides are compared.
"""

import argparse
from random import Random

import torch
from _common import compare, report
from decoding import HEADS, IMAGE, LAYERS, VOCAB, WIDTH, generate

from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration
from otter_hf.models.media_store import MediaStore


QUESTIONS, SHOTS, POOL, TOKENS = 20, 8, 100, 5


def make_model() -> FlamingoForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32, "hidden_size": 768}
    vision |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = FlamingoConfig(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=1.0,
        perceiver_num_latents=64,
        image_token_id=IMAGE,
    )
    return FlamingoForConditionalGeneration(config).eval()


def picture(number: int) -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(number))


def make_questions(drawn: bool) -> list[dict]:
    random, questions = Random(0), []
    for question in range(QUESTIONS):
        shots = random.sample(range(POOL), SHOTS) if drawn else range(SHOTS)
        generator = torch.Generator().manual_seed(question)
        ids = torch.randint(3, IMAGE, (1, 16 * (SHOTS + 1)), generator=generator)
        ids[:, ::16] = IMAGE
        pixels = torch.stack([*map(picture, shots), picture(POOL + question)])[None]  # (1, T, 1, 3, 224, 224)
        questions.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return questions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = make_model()

    def answer(questions: list[dict], store: MediaStore | None) -> list[list[int]]:
        batches = (question if store is None else store.encode(question) for question in questions)
        return [generate(model, batch, TOKENS)[0, -TOKENS:].tolist() for batch in batches]

    rows = []
    for drawn in (False, True):
        questions = make_questions(drawn)
        store = MediaStore(model)
        if answer(questions, store) != answer(questions, None):
            raise SystemExit("With and without the store the model generates different tokens.")
        name = f"drawn from {POOL}" if drawn else "the same for all"
        rows.append(
            compare(
                f"{QUESTIONS} questions after {SHOTS} pictures, {name}",
                lambda questions=questions: answer(questions, MediaStore(model)),
                lambda questions=questions: answer(questions, None),
                args.repeats,
                media=store.hits + store.misses,
                encoded=store.misses,
            )
        )
    report("media_store", "the same model given pixel_values", rows)


if __name__ == "__main__":
    main()
