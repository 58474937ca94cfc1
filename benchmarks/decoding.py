"""Decoding speed: our cache beside no cache, and beside transformers' Idefics of equal size.

    OMP_NUM_THREADS=2 python benchmarks/decoding.py      # about five minutes on two cores

Random weights, float32: width 512, 8 layers, 8 heads, a gated cross-attention in front of every second layer,
vocabulary 4096; the vision tower has two layers, as it runs once. 32 tokens are generated greedily.

Cache or not: 4 rows of 96 and of 192 tokens with 4 images each, the same model and tokens on both sides, which are
compared.
Idefics: 1 and 4 rows of 96 tokens with 1, 4 and 16 images, decoding steps only (32 tokens less the first). Idefics is
the in-tree model of the same architecture (perceiver, gated cross-attention); its blocks have the same widths, and
both sides hold about the same number of parameters, which the rows give. The last rows say what a step's time is spent
on.
"""

import argparse
import time

import torch
from _common import compare, report, summary
from torch.profiler import profile
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration


WIDTH, LAYERS, HEADS, VOCAB, LATENTS, IMAGE = 512, 8, 8, 4096, 64, 4095
TOKENS, PROMPT = 32, 96
VISION = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_ours() -> FlamingoForConditionalGeneration:
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    vision = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **VISION}
    config = FlamingoConfig(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=1.0,
        perceiver_depth=2,
        perceiver_num_latents=LATENTS,
        image_token_id=IMAGE,
    )
    return FlamingoForConditionalGeneration(config).eval()


def make_peer() -> IdeficsForVisionText2Text:
    torch.manual_seed(0)
    config = IdeficsConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCAB,
        additional_vocab_size=0,
        cross_layer_interval=2,
        alpha_initializer="ones",
        use_resampler=True,
        tie_word_embeddings=False,
        vision_config={
            "embed_dim": VISION["hidden_size"],
            "image_size": 56,
            "patch_size": 14,
            "intermediate_size": VISION["intermediate_size"],
            "num_hidden_layers": VISION["num_hidden_layers"],
            "num_attention_heads": VISION["num_attention_heads"],
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_depth": 2,
            "resampler_n_heads": 8,
            "resampler_head_dim": 64,
            "resampler_n_latents": LATENTS,
        },
    )
    return IdeficsForVisionText2Text(config).eval()


def make_prompt(batch_size: int, num_images: int, length: int = PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE, (batch_size, length), generator=generator)
    ids[:, : num_images * (length // num_images) : length // num_images] = IMAGE
    return ids, torch.randn(batch_size, num_images, 3, 56, 56, generator=generator)


def generate(model, inputs: dict, num_tokens: int = TOKENS, **kwargs) -> torch.Tensor:
    settings = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "pad_token_id": 0}
    return model.generate(**inputs, **settings, **kwargs)


def cached_or_not(model, length: int, repeats: int) -> dict:
    ids, pixels = make_prompt(4, 4, length)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    if not torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False)):
        raise SystemExit("With and without cache the model generates different tokens.")
    return compare(
        f"{TOKENS} tokens x 4 rows after {length} tokens, 4 images: cached, or not",
        lambda: generate(model, inputs),
        lambda: generate(model, inputs, use_cache=False),
        repeats,
    )


def decoding_seconds(model, inputs: dict) -> float:
    """Seconds per generated token after the first, whose cost is the prompt's."""
    seconds = []
    for num_tokens in (1, TOKENS):
        start = time.perf_counter()
        generate(model, inputs, num_tokens)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (TOKENS - 1)


def make_inputs(batch_size: int, num_images: int) -> tuple[dict, torch.Tensor]:
    """Inputs of both sides, and the mask `(B, L, T)` that Idefics takes in addition."""
    ids, pixels = make_prompt(batch_size, num_images)
    index = (ids == IMAGE).long().cumsum(1)  # (B, L)
    image_mask = torch.nn.functional.one_hot(index, num_images + 1)[..., 1:]
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}, image_mask


def beside_idefics(ours, peer, batch_size: int, num_images: int, repeats: int) -> dict:
    inputs, image_mask = make_inputs(batch_size, num_images)
    sides = ((ours, inputs), (peer, {**inputs, "image_attention_mask": image_mask}))
    seconds = ([], [])
    for _ in range(repeats + 1):
        for values, (model, model_inputs) in zip(seconds, sides, strict=True):
            values.append(decoding_seconds(model, model_inputs))
    seconds = [values[1:] for values in seconds]  # the first was the warm-up
    return {
        "workload": f"one decoding step, {batch_size} rows, {num_images} images, beside Idefics",
        "unit": "s",
        "ours": summary(seconds[0], 5),
        "peer": summary(seconds[1], 5),
        "ratio": summary([b / a for a, b in zip(*seconds, strict=True)], 2),
        "parameters": {"ours": ours.num_parameters(), "peer": peer.num_parameters()},
    }


def profile_row(model, side: str, inputs: dict) -> dict:
    """Shares of the CPU time of decoding steps, by kind of operation."""
    shares = {"matrix products": 0.0, "growing the text cache": 0.0, "attention": 0.0, "everything else": 0.0}
    for num_tokens, sign in ((1, -1), (TOKENS, 1)):  # the first token is the prompt's
        with profile() as trace:
            generate(model, inputs, num_tokens)
        for event in trace.key_averages():
            if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
                kind = "matrix products"
            elif event.key == "aten::cat":
                kind = "growing the text cache"
            elif "scaled_dot_product" in event.key:
                kind = "attention"
            else:
                kind = "everything else"
            shares[kind] += sign * event.self_cpu_time_total
    total = sum(shares.values())
    return {
        "workload": f"profile of a decoding step, 1 row, 1 image, {side}",
        "unit": "share of CPU time",
        side: {kind: round(share / total, 3) for kind, share in shares.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    ours, peer = make_ours(), make_peer()
    rows = [cached_or_not(ours, PROMPT, repeats), cached_or_not(ours, 2 * PROMPT, min(repeats, 3))]
    for batch_size, num_images in ((1, 1), (1, 4), (1, 16), (4, 4)):
        rows.append(beside_idefics(ours, peer, batch_size, num_images, repeats))
    inputs, image_mask = make_inputs(1, 1)
    rows.append(profile_row(ours, "ours", inputs))
    rows.append(profile_row(peer, "peer", {**inputs, "image_attention_mask": image_mask}))
    report("decoding", "no cache; transformers IdeficsForVisionText2Text", rows)


if __name__ == "__main__":
    main()
