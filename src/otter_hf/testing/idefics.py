"""A tiny random Idefics, made as the published ones: the rows of its three added tokens are kept apart."""

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessorPil, IdeficsProcessor

from .otter import build_tokenizer


TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]


def tiny_config(vocab_size: int, **options) -> IdeficsConfig:
    """Two layers of width 32; `options` change single fields."""
    vision = {"embed_dim": 32, "image_size": 28, "patch_size": 14, "num_hidden_layers": 1}
    resampler = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    fixed = {
        "additional_vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cross_layer_interval": 1,
        "alpha_initializer": "ones",
        "initializer_range": 0.2,
        "use_resampler": True,
        "vision_config": {**vision, "num_attention_heads": 2, "intermediate_size": 64},
        "perceiver_config": resampler,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
    }
    return IdeficsConfig(vocab_size=vocab_size, **fixed | options)


def tiny_processor() -> IdeficsProcessor:
    """A processor of 28x28 pictures with a byte tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<unk>", "unk_token": "<unk>"})
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), tokenizer)


def tiny_model(processor: IdeficsProcessor, **options) -> IdeficsForVisionText2Text:
    """A random Idefics in evaluation mode."""
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(len(tokenizer) - len(TOKENS), **ids, **options)
    return IdeficsForVisionText2Text(config).eval()
